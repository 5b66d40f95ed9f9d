"""The compiled kernels on a CPU: their PTX, instruction by instruction, in an interpreter.

    interpreter/   C++, bound by pybind11: parser, memory, machine, instructions, counters, and the
                   stand-in for the CUDA runtime that the package's launchers are linked to
    build.py       builds it, and the launchers with their kernels' PTX
    cuda.py        the launchers as tests/emulation has them, every launch in every order of warps

``machine.h``, ``memory.h`` and ``instructions.cpp`` say what is checked and what is modelled. Not
modelled: what ptxas makes of PTX (registers, the order of instructions), and time.
"""
