#include "text_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "unigram_encoder.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace megatron_bert;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
Array<T> as_array(std::vector<T> values) {
    auto owned = std::make_unique<std::vector<T>>(std::move(values));
    const py::capsule owner(owned.get(),
                            [](void* kept) { delete static_cast<std::vector<T>*>(kept); });
    const std::vector<T>& kept = *owned.release();
    return Array<T>(static_cast<py::ssize_t>(kept.size()), kept.data(), owner);
}

/// The characters of a Python string as stored in memory, 1, 2 or 4 bytes each.
class Text {
  public:
    explicit Text(const py::handle& text) : text_(py::reinterpret_borrow<py::object>(text)) {
        if (!PyUnicode_Check(text.ptr())) {
            throw py::type_error("expected strings");
        }
        kind_ = static_cast<int>(PyUnicode_KIND(text.ptr()));
        data_ = PyUnicode_DATA(text.ptr());
        length_ = static_cast<std::size_t>(PyUnicode_GET_LENGTH(text.ptr()));
    }

    /// Calls `use` with a span of the characters. Needs no GIL: strings do not change, and this one
    /// is kept alive.
    template <typename Use>
    auto with_characters(Use use) const {
        switch (kind_) {
            case PyUnicode_1BYTE_KIND:
                return use(characters<Py_UCS1>());
            case PyUnicode_2BYTE_KIND:
                return use(characters<Py_UCS2>());
            default:
                return use(characters<Py_UCS4>());
        }
    }

  private:
    template <typename Character>
    std::span<const Character> characters() const {
        return {static_cast<const Character*>(data_), length_};
    }

    py::object text_;
    int kind_;
    const void* data_;
    std::size_t length_;
};

std::unique_ptr<UnigramEncoder> make_encoder(const py::list& pieces, const Array<float>& scores,
                                             const Array<std::int32_t>& ids,
                                             const Array<std::int32_t>& byte_ids,
                                             bool space_in_front) {
    std::array<std::int32_t, 256> bytes{};
    const auto num_pieces = static_cast<py::ssize_t>(pieces.size());
    if (scores.size() != num_pieces || ids.size() != num_pieces ||
        byte_ids.size() != static_cast<py::ssize_t>(bytes.size())) {
        throw std::invalid_argument("expected a score and an id for each piece, and 256 byte ids");
    }
    std::copy_n(byte_ids.data(), bytes.size(), bytes.begin());
    std::vector<std::u32string> texts;
    texts.reserve(pieces.size());
    for (const py::handle& piece : pieces) {
        texts.push_back(Text(piece).with_characters(
            [](auto characters) { return std::u32string(characters.begin(), characters.end()); }));
    }
    std::vector<UnigramEncoder::Piece> described;
    described.reserve(texts.size());
    for (std::size_t i = 0; i < texts.size(); ++i) {
        described.push_back({texts[i], scores.data()[i], ids.data()[i]});
    }
    return std::make_unique<UnigramEncoder>(std::move(described), bytes, space_in_front);
}

py::tuple encode(const UnigramEncoder& encoder, const py::list& texts) {
    const std::vector<Text> held(texts.begin(), texts.end());
    Array<std::int64_t> lengths(static_cast<py::ssize_t>(held.size()));
    std::int64_t* length = lengths.mutable_data();
    std::vector<std::int32_t> ids;
    {
        const py::gil_scoped_release release;
        UnigramEncoder::Workspace workspace;
        for (const Text& text : held) {
            const std::size_t before = ids.size();
            text.with_characters(
                [&](auto characters) { encoder.encode(characters, workspace, ids); });
            *length++ = static_cast<std::int64_t>(ids.size() - before);
        }
    }
    return py::make_tuple(as_array(std::move(ids)), std::move(lengths));
}

}  // namespace

void bind_text(py::module_& m) {
    py::class_<UnigramEncoder>(m, "UnigramEncoder")
        .def(py::init(&make_encoder), "pieces"_a, py::arg("scores").noconvert(),
             py::arg("ids").noconvert(), py::arg("byte_ids").noconvert(), "space_in_front"_a)
        .def("encode", &encode, "texts"_a);
}
