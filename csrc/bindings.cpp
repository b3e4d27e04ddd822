// Python's view of the kernels: addresses come as integers, so the extension knows nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "huge_pages.h"
#include "instructions.h"
#include "moments_update.h"
#include "peak.h"
#include "project.h"
#include "quantized_update.h"
#include "symmetric_sum.h"

namespace py = pybind11;

namespace {

template <typename T>
std::vector<T*> pointers(const std::vector<uintptr_t>& addresses) {
    std::vector<T*> result;
    result.reserve(addresses.size());
    for (const uintptr_t address : addresses) result.push_back(reinterpret_cast<T*>(address));
    return result;
}

loft_fast::Rows rows_at(uintptr_t x, int dtype, int64_t n, int64_t d, int64_t row_stride, int64_t col_stride) {
    return {reinterpret_cast<const void*>(x), static_cast<loft_fast::DType>(dtype), n, d, row_stride, col_stride};
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "CPU kernels of loft_fast; loft_fast.ops checks arguments before it calls them.";
    module.def(
        "moments_update",
        [](uintptr_t x, int dtype, int64_t n, int64_t d, int64_t row_stride, int64_t col_stride, uintptr_t group,
           uintptr_t count, uintptr_t mean, const std::vector<uintptr_t>& scatter, int threads) {
            const auto rows = rows_at(x, dtype, n, d, row_stride, col_stride);
            loft_fast::moments_update(rows, reinterpret_cast<const int64_t*>(group),
                                      reinterpret_cast<int64_t*>(count), reinterpret_cast<double*>(mean),
                                      pointers<double>(scatter), threads);
        },
        py::call_guard<py::gil_scoped_release>());
    module.def(
        "quantized_update",
        [](uintptr_t x, int dtype, int64_t n, int64_t d, int64_t row_stride, int64_t col_stride, double inverse,
           uintptr_t group, uintptr_t count, uintptr_t total, uintptr_t clipped, const std::vector<uintptr_t>& product,
           int threads) {
            const auto rows = rows_at(x, dtype, n, d, row_stride, col_stride);
            loft_fast::quantized_update(rows, inverse, reinterpret_cast<const int64_t*>(group),
                                        reinterpret_cast<int64_t*>(count), reinterpret_cast<int64_t*>(total),
                                        reinterpret_cast<int64_t*>(clipped), pointers<int64_t>(product), threads);
        },
        py::call_guard<py::gil_scoped_release>());
    module.def(
        "project",
        [](uintptr_t x, int dtype, int64_t n, int64_t d, int64_t row_stride, int64_t col_stride, uintptr_t basis,
           uintptr_t center, int64_t s, uintptr_t out, int threads) {
            const auto rows = rows_at(x, dtype, n, d, row_stride, col_stride);
            loft_fast::project(rows, reinterpret_cast<const void*>(basis), reinterpret_cast<const void*>(center), s,
                               reinterpret_cast<void*>(out), threads);
        },
        py::call_guard<py::gil_scoped_release>());
    module.def(
        "symmetric_sum",
        [](uintptr_t out, const std::vector<uintptr_t>& matrices, int64_t d, int threads) {
            loft_fast::symmetric_sum(reinterpret_cast<double*>(out), pointers<const double>(matrices), d, threads);
        },
        py::call_guard<py::gil_scoped_release>());
    module.def("use_huge_pages", [](uintptr_t data, size_t bytes) {
        loft_fast::use_huge_pages(reinterpret_cast<void*>(data), bytes);
    });
    module.def("instructions", &loft_fast::instructions_name);
    module.def("known_instructions", &loft_fast::known_instructions);
    module.def("use_instructions", &loft_fast::use_instructions);
    module.def("multiply_adds", &loft_fast::multiply_adds, py::call_guard<py::gil_scoped_release>());
}
