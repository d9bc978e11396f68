// The part of the Python module for making datasets from text.
#pragma once

#include <pybind11/pybind11.h>

void bind_text(pybind11::module_& m);
