// How the stand-in of the CUDA runtime, which is linked to the package's launchers, reaches the
// machine, which is a Python module.
#pragma once

#include <stddef.h>
#include <stdint.h>

struct PtxLaunch {  // as the launcher asked for it
  const char* kernel;
  uint32_t blocks[3], threads[3];
  size_t shared;     // bytes, dynamic
  void** arguments;  // one pointer a parameter
  int overlaps;      // it may start while the kernel before it runs
};

struct PtxHooks {
  void* context;
  int (*launch)(void* context, const PtxLaunch* launch);  // 0: it ran
  void (*allow)(void* context, const void* start, size_t bytes, int writable);
  void (*forbid_all)(void* context);
  int (*architecture)(void* context);
};
