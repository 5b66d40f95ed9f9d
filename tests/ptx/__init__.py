"""The compiled kernels on a CPU: their PTX, instruction by instruction, in an interpreter.

    interpreter/      C++, bound by pybind11: parser, memory, machine, instructions, counters, and
                      the stand-in for the CUDA runtime that the package's launchers are linked to
    build.py          builds it, and the launchers with their kernels' PTX
    cuda.py           the launchers as tests/emulation has them, each run in every order of warps
    triton_launch.py  the same for the package's Triton launches
    worker.py         the process in which they run; cases.py: what it runs
    counts.py         what the kernels of a training step cost

``machine.h``, ``memory.h`` and ``instructions.cpp`` say what is checked and what is modelled. Not
modelled: what ptxas makes of PTX (registers, the order of instructions), and time.
"""
