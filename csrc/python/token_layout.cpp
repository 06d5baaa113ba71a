// linmu_ops._C: the layout planner of csrc/linmu/token_layout.h for Python, with numpy arrays in and out. It is built
// from source alone: csrc/cpu/token_layout.cpp offers the same class to every Python.
#include "../linmu/token_layout.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using linmu::Plan;
using linmu::Triple;

namespace {

using Integers = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

Plan make_plan(const Integers& blocks, const Integers& positions, int64_t batch_size, int64_t length) {
  if (blocks.ndim() != 2 || blocks.shape(1) != 4) linmu::refuse("blocks must be (num_blocks, 4)");
  if (positions.ndim() != 1) linmu::refuse("positions must be (num_visual,)");
  return Plan(blocks.data(), blocks.shape(0), positions.data(), positions.shape(0), batch_size, length);
}

py::array_t<int32_t> array(const std::vector<int32_t>& values) {
  return py::array_t<int32_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("VERSION") = linmu::kPlanVersion;
  m.attr("COMPILER") = LINMU_COMPILER;
  py::class_<Plan>(m, "Plan")
      .def(py::init(&make_plan), py::arg("blocks"), py::arg("positions"), py::arg("batch_size"), py::arg("length"))
      .def("segments",
           [](const Plan& plan) {
             py::array_t<bool> mask({plan.batch_size(), plan.length()});
             py::array_t<int32_t> index({plan.batch_size(), plan.length()});
             plan.segments(mask.mutable_data(), index.mutable_data());
             return py::make_tuple(mask, index);
           })
      .def("scan_order",
           [](const Plan& plan, int mode) {
             py::array_t<int32_t> order({plan.batch_size(), plan.length()});
             plan.scan_order(mode, order.mutable_data());
             return order;
           })
      .def("window_table", [](const Plan& plan, const Triple& window, const Triple& shift, const Triple& image_window,
                              const Triple& image_shift, bool wrap_mask) {
        const linmu::WindowTable table = plan.window_table(window, shift, image_window, image_shift, wrap_mask);
        return py::make_tuple(array(table.tokens), array(table.offsets), array(table.coords), table.max_tokens);
      });
}
