// Python's view of the kernels: addresses come as integers, so the extension knows nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "eigh.h"
#include "gram.h"
#include "instructions.h"
#include "inverse_form.h"
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

// Without y, x is multiplied with itself. The address of a tensor without numbers is zero, so that tells nothing.
template <typename T>
void gram(uintptr_t x, const std::array<int64_t, 3>& x_strides, std::optional<uintptr_t> y,
          const std::array<int64_t, 3>& y_strides, int64_t many, int64_t n, int64_t x_columns, int64_t y_columns,
          uintptr_t out, int threads) {
    const auto at = [](uintptr_t data, int64_t columns, const std::array<int64_t, 3>& strides) {
        return loft_fast::Matrices<T>{reinterpret_cast<const T*>(data), columns, strides[0], strides[1], strides[2]};
    };
    const auto left = at(x, x_columns, x_strides), right = at(y.value_or(0), y_columns, y_strides);
    loft_fast::gram<T>(left, y ? &right : nullptr, many, n, reinterpret_cast<T*>(out), threads);
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
    module.def("gram", &gram<float>, py::call_guard<py::gil_scoped_release>());
    module.def("gram_double", &gram<double>, py::call_guard<py::gil_scoped_release>());
    module.def(
        "inverse_form",
        [](uintptr_t matrix, uintptr_t border, int64_t many, int64_t d, int64_t s, uintptr_t out, uintptr_t positive,
           int threads) {
            loft_fast::inverse_form(reinterpret_cast<const double*>(matrix), reinterpret_cast<const double*>(border),
                                    many, d, s, reinterpret_cast<double*>(out), reinterpret_cast<bool*>(positive),
                                    threads);
        },
        py::call_guard<py::gil_scoped_release>());
    module.def(
        "eigh",
        [](uintptr_t matrix, int64_t many, int64_t d, uintptr_t values, uintptr_t vectors, int threads) {
            return loft_fast::eigh(reinterpret_cast<const float*>(matrix), many, d, reinterpret_cast<float*>(values),
                                   reinterpret_cast<float*>(vectors), threads);
        },
        py::call_guard<py::gil_scoped_release>());
    module.def("instructions", &loft_fast::instructions_name);
    module.def("known_instructions", &loft_fast::known_instructions);
    module.def("use_instructions", &loft_fast::use_instructions);
    module.def("multiply_adds", &loft_fast::multiply_adds, py::call_guard<py::gil_scoped_release>());
}
