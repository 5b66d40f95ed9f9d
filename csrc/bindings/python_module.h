// `import cifar_resnet_fast._C` only has to load the library: its static initialisers register the
// operations with torch. So the Python module is empty.
#pragma once

#include <Python.h>

#define EMPTY_PYTHON_MODULE(NAME)                                                                \
  PyMODINIT_FUNC PyInit_##NAME(void);                                                            \
  PyMODINIT_FUNC PyInit_##NAME(void) {                                                           \
    static PyModuleDef definition = {                                                            \
        PyModuleDef_HEAD_INIT, #NAME, nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr}; \
    return PyModule_Create(&definition);                                                         \
  }
