// What the Python module offers for making datasets of text.
#pragma once

#include <pybind11/pybind11.h>

void bind_text(pybind11::module_& m);
