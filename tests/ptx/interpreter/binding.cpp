// The machine for Python, and for the stand-in of the CUDA runtime (runtime.cpp).
#include <cxxabi.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>

#include "hooks.h"
#include "machine.h"

namespace py = pybind11;
using ptx::Machine;

namespace {

// ---- for the runtime's stand-in ----

int run_recorded(void* context, const PtxLaunch* recorded) {
  Machine& machine = *static_cast<Machine*>(context);
  try {
    ptx::Launch launch{recorded->kernel, {}, {}, recorded->shared, recorded->overlaps != 0};
    std::copy_n(recorded->blocks, 3, launch.blocks);
    std::copy_n(recorded->threads, 3, launch.threads);
    const ptx::Program& program = machine.program(launch.kernel);
    std::vector<uint8_t> parameters(program.parameter_bytes);
    for (size_t i = 0; i < program.parameters.size(); ++i) {
      const auto& [offset, bytes] = program.parameters[i];
      std::memcpy(parameters.data() + offset, recorded->arguments[i], bytes);
    }
    machine.run(launch, parameters.data());
    return 0;
  } catch (const std::exception& error) {
    machine.report(error.what(), error.what());
    return 1;
  }
}
void allow(void* context, const void* start, size_t bytes, int writable) {
  static_cast<Machine*>(context)->memory.allow(start, bytes, writable != 0);
}
void forbid_all(void* context) {
  static_cast<Machine*>(context)->memory.forbid_all();
}
int architecture(void* context) {
  return static_cast<Machine*>(context)->architecture;
}

// ---- for Python ----

template <class Row, size_t WORDS>
py::array_t<uint64_t> table(const std::vector<Row>& rows) {
  static_assert(sizeof(Row) == WORDS * sizeof(uint64_t));
  py::array_t<uint64_t> made({rows.size(), WORDS});
  std::memcpy(made.mutable_data(), rows.data(), rows.size() * sizeof(Row));
  return made;
}

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  const std::string result = status == 0 ? text : name;
  std::free(text);
  return result;
}

}  // namespace

PYBIND11_MODULE(ptx_interpreter, module) {
  py::enum_<ptx::Order>(module, "Order")
      .value("forward", ptx::Order::kForward)
      .value("reversed", ptx::Order::kReversed)
      .value("random", ptx::Order::kRandom);
  module.def("demangled", demangled);
  py::class_<Machine>(module, "Machine")
      .def(py::init())
      .def_readwrite("order", &Machine::order)
      .def_readwrite("seed", &Machine::seed)
      .def_readwrite("early_copies", &Machine::early_copies)
      .def_readwrite("architecture", &Machine::architecture)
      .def_readonly("last_kernel", &Machine::last_kernel)
      .def("load", &Machine::load)
      .def("forget", &Machine::forget)
      .def("take_findings", &Machine::take_findings)
      .def("synchronise", [](Machine& m) { m.memory.synchronise(); })
      .def("allow",
           [](Machine& m, const py::array& memory, bool writable) {
             m.memory.allow(memory.data(), memory.nbytes(), writable);
           })
      .def("forbid_all", [](Machine& m) { m.memory.forbid_all(); })
      .def("parameters",
           [](Machine& m, const std::string& kernel) {
             std::vector<std::pair<size_t, size_t>> places;
             for (const auto& p : m.program(kernel).parameters) {
               places.emplace_back(p.offset, p.bytes);
             }
             return places;
           })
      .def("instructions",
           [](Machine& m, const std::string& kernel) {
             std::vector<std::pair<int, std::string>> lines;
             for (const auto& in : m.program(kernel).code) lines.emplace_back(in.line, in.name);
             return lines;
           })
      .def("run",
           [](Machine& m, const std::string& kernel, const std::array<uint32_t, 3>& blocks,
              uint32_t threads, size_t dynamic_shared, const py::bytes& parameters) {
             const std::string bytes = parameters;
             if (bytes.size() != m.program(kernel).parameter_bytes) {
               throw ptx::Failure("parameters of a wrong size");
             }
             m.run({kernel,
                    {blocks[0], blocks[1], blocks[2]},
                    {threads, 1, 1},
                    dynamic_shared,
                    false},
                   reinterpret_cast<const uint8_t*>(bytes.data()));
           })
      // of the last launch: [warp, field] and [instruction, field] of counters.h
      .def("warp_counts",
           [](Machine& m) { return table<ptx::WarpCounts, ptx::kPipes + 8>(m.counters.warps); })
      .def("instruction_counts",
           [](Machine& m) { return table<ptx::InstructionCounts, 3>(m.counters.instructions); })
      .def("executed",
           [](Machine& m) {
             std::map<std::string, py::array_t<uint64_t>> made;
             for (const auto& [kernel, counts] : m.executed) {
               made[kernel] = table<ptx::InstructionCounts, 3>(counts);
             }
             return made;
           })
      .def("hooks", [](Machine& m) {
        // kept for as long as the process, as the library that calls them
        return reinterpret_cast<uintptr_t>(
            new PtxHooks{&m, run_recorded, allow, forbid_all, architecture});
      });
  py::register_exception<ptx::Failure>(module, "Failure", PyExc_RuntimeError);
}
