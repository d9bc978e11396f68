// The Python module _megatron_bert_core: argument conversion only.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "batch.h"
#include "hash_set.h"
#include "indexed_dataset.h"
#include "row_plan.h"
#include "text_bindings.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace megatron_bert;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
std::span<const T> view(const Array<T>& array) {
    if (array.ndim() != 1) {
        throw std::invalid_argument("expected an array of one dimension, got " +
                                    std::to_string(array.ndim()));
    }
    return {array.data(), static_cast<std::size_t>(array.size())};
}

Array<std::int32_t> document(const IndexedDataset& dataset, std::int64_t number) {
    if (number < 0 || number >= dataset.num_documents()) {
        throw py::index_error("document " + std::to_string(number) + " of " +
                              std::to_string(dataset.num_documents()));
    }
    const std::int64_t length = dataset.document_length(number);
    Array<std::int32_t> tokens(length);
    std::int32_t* out = tokens.mutable_data();
    {
        const py::gil_scoped_release release;
        dataset.copy_tokens(number, 0, length, out);
    }
    return tokens;
}

Array<std::int64_t> document_lengths(const IndexedDataset& dataset) {
    Array<std::int64_t> lengths(dataset.num_documents());
    std::int64_t* out = lengths.mutable_data();
    const py::gil_scoped_release release;
    for (std::int64_t i = 0; i < dataset.num_documents(); ++i) {
        out[i] = dataset.document_length(i);
    }
    return lengths;
}

void bind_indexed_dataset(py::module_& m) {
    py::class_<IndexedDataset, std::shared_ptr<IndexedDataset>>(m, "IndexedDataset")
        .def(py::init([](std::string prefix, bool mmap) {
                 return std::make_shared<IndexedDataset>(
                     std::move(prefix), mmap ? FileAccess::map : FileAccess::read);
             }),
             "prefix"_a, py::kw_only(), "mmap"_a = true, NoGil())
        .def_property_readonly("prefix", &IndexedDataset::prefix)
        .def_property_readonly("num_documents", &IndexedDataset::num_documents)
        .def_property_readonly("num_sequences", &IndexedDataset::num_sequences)
        .def_property_readonly("num_tokens", &IndexedDataset::num_tokens)
        .def_property_readonly("is_mapped", &IndexedDataset::is_mapped)
        .def_property_readonly(
            "token_bytes", [](const IndexedDataset& d) { return bytes_of(d.token_type()); })
        .def_property_readonly(
            "dtype_code", [](const IndexedDataset& d) { return static_cast<int>(d.token_type()); })
        .def("document", &document, "document"_a)
        .def("document_lengths", &document_lengths)
        .def("max_token_id", &IndexedDataset::max_token_id, "sample_documents"_a = 1024, NoGil())
        .def("check_unchanged", &IndexedDataset::check_unchanged, NoGil());
}

Array<bool> documents_on_side(const CorpusLengths& lengths, std::int64_t first, std::int64_t end) {
    if (first < 0 || end < first) {
        throw py::index_error("documents " + std::to_string(first) + " to " + std::to_string(end));
    }
    Array<bool> on_side(end - first);
    bool* out = on_side.mutable_data();
    const py::gil_scoped_release release;
    for (std::int64_t number = first; number < end; ++number) {
        out[number - first] = lengths.has(number);
    }
    return on_side;
}

/// Keeps a Python object alive; C++ code may drop the result without holding the GIL.
std::shared_ptr<const void> keep_alive(py::object object) {
    return {object.release().ptr(), [](const void* kept) {
                const py::gil_scoped_acquire acquire;
                py::handle(static_cast<PyObject*>(const_cast<void*>(kept))).dec_ref();
            }};
}

CorpusLengths corpus_lengths(const py::object& source) {
    if (py::isinstance<CorpusLengths>(source)) {
        return source.cast<CorpusLengths>();
    }
    if (py::isinstance<IndexedDataset>(source)) {
        return CorpusLengths(source.cast<std::shared_ptr<IndexedDataset>>());
    }
    if (py::isinstance<Array<std::int32_t>>(source)) {
        return {view(source.cast<Array<std::int32_t>>()), keep_alive(source)};
    }
    if (py::isinstance<Array<std::int64_t>>(source)) {
        return {view(source.cast<Array<std::int64_t>>()), keep_alive(source)};
    }
    throw py::type_error(
        "lengths must be an IndexedDataset, DocumentLengths, or a contiguous array of int32 or "
        "int64");
}

using StageTuples = std::vector<std::pair<std::int64_t, std::int64_t>>;

std::shared_ptr<RowPlan> make_row_plan(const std::vector<py::object>& lengths,
                                       std::vector<double> weights, const StageTuples& stages,
                                       std::uint64_t seed) {
    std::vector<CorpusLengths> corpora;
    for (const py::object& source : lengths) {
        corpora.push_back(corpus_lengths(source));
    }
    std::vector<Stage> plan_stages;
    for (const auto& [seq_length, rows] : stages) {
        plan_stages.push_back({seq_length, rows});
    }
    const py::gil_scoped_release release;
    return std::make_shared<RowPlan>(std::move(corpora), std::move(weights),
                                     std::move(plan_stages), seed);
}

using SegmentTuple = std::tuple<std::size_t, std::int64_t, std::int64_t, std::int64_t>;

std::vector<SegmentTuple> segments(const RowPlan& plan, std::int64_t row) {
    std::vector<Segment> found;
    plan.segments(row, found);
    std::vector<SegmentTuple> tuples;
    for (const auto& [corpus, span] : found) {
        tuples.emplace_back(corpus, span.document, span.offset, span.length);
    }
    return tuples;
}

void bind_row_plan(py::module_& m) {
    py::class_<CorpusLengths>(m, "DocumentLengths")
        .def(py::init([](std::shared_ptr<IndexedDataset> dataset, double held_out_fraction,
                         bool held_out) {
                 return CorpusLengths(std::move(dataset), {held_out_fraction, held_out});
             }),
             "dataset"_a, py::kw_only(), "held_out_fraction"_a, "held_out"_a, NoGil())
        .def_property_readonly("num_tokens", &CorpusLengths::num_tokens)
        .def_property_readonly(
            "num_nonempty_documents",
            py::cpp_function(&CorpusLengths::count_nonempty_documents, NoGil()))
        .def("on_side", &documents_on_side, "first"_a, "end"_a);

    py::class_<RowPlan, std::shared_ptr<RowPlan>>(m, "RowPlan")
        .def(py::init(&make_row_plan), "lengths"_a, "weights"_a, "stages"_a, "seed"_a)
        .def_property_readonly("num_rows", &RowPlan::num_rows)
        .def("segments", &segments, "row"_a)
        .def(
            "stage_of",
            [](const RowPlan& plan, std::int64_t row) {
                const auto [stage, stage_row] = plan.stage_of(row);
                return std::pair(stage, stage_row);
            },
            "row"_a)
        .def("epochs", &RowPlan::epochs);
    m.def(
        "epoch_rows",
        [](const py::object& source, std::int64_t seq_length, std::uint64_t seed,
           std::size_t corpus, std::optional<std::int64_t> limit) {
            const CorpusLengths lengths = corpus_lengths(source);
            const py::gil_scoped_release release;
            return epoch_rows(lengths, seq_length, seed, corpus,
                              limit.value_or(std::numeric_limits<std::int64_t>::max()));
        },
        "lengths"_a, "seq_length"_a, "seed"_a = 0, "corpus"_a = 0, "limit"_a = py::none());
}

MaskUnit mask_unit_of(const std::string& name) {
    if (name == "token") {
        return MaskUnit::token;
    }
    if (name == "whole_word") {
        return MaskUnit::whole_word;
    }
    if (name == "ngram") {
        return MaskUnit::ngram;
    }
    throw std::invalid_argument("unit must be token, whole_word or ngram, got " + name);
}

template <typename T>
std::vector<T> copy(const Array<T>& array) {
    const auto values = view(array);
    return {values.begin(), values.end()};
}

/// A pointer to the first value of the array, which must have the shape `rows` x `columns`.
template <typename T>
T* matrix(Array<T>& array, py::ssize_t rows, py::ssize_t columns, const char* name) {
    if (array.ndim() != 2 || array.shape(0) != rows || array.shape(1) != columns) {
        throw std::invalid_argument(std::string(name) + " must have the shape [" +
                                    std::to_string(rows) + ", " + std::to_string(columns) + "]");
    }
    return array.mutable_data();
}

std::uint64_t fill(const BatchAssembler& assembler, const Array<std::int64_t>& rows,
                   Array<std::int32_t>& tokens, Array<std::int32_t>& positions,
                   Array<std::int32_t>& masked, Array<std::int32_t>& labels,
                   Array<float>& weights) {
    if (tokens.ndim() != 2 || masked.ndim() != 2) {
        throw std::invalid_argument("tokens and masked must have two dimensions");
    }
    const py::ssize_t num_rows = rows.size();
    const py::ssize_t seq_length = tokens.shape(1);
    const py::ssize_t slots = masked.shape(1);
    const BatchArrays batch{view(rows),
                            static_cast<std::size_t>(seq_length),
                            static_cast<std::size_t>(slots),
                            matrix(tokens, num_rows, seq_length, "tokens"),
                            matrix(positions, num_rows, seq_length, "positions"),
                            matrix(masked, num_rows, slots, "masked"),
                            matrix(labels, num_rows, slots, "labels"),
                            matrix(weights, num_rows, slots, "weights")};
    const py::gil_scoped_release release;
    return assembler.fill(batch);
}

std::vector<CorpusFiles> corpus_files(
    const std::vector<std::shared_ptr<IndexedDataset>>& datasets,
    const std::vector<std::shared_ptr<WordStarts>>& word_starts) {
    if (!word_starts.empty() && datasets.size() != word_starts.size()) {
        throw std::invalid_argument(std::to_string(word_starts.size()) + " word_starts for " +
                                    std::to_string(datasets.size()) + " datasets");
    }
    std::vector<CorpusFiles> files;
    for (std::size_t corpus = 0; corpus < datasets.size(); ++corpus) {
        files.push_back({datasets[corpus], word_starts.empty() ? nullptr : word_starts[corpus]});
    }
    return files;
}

void bind_batch_assembler(py::module_& m) {
    py::class_<WordStarts, std::shared_ptr<WordStarts>>(m, "WordStarts")
        .def(py::init<const std::string&, std::int64_t>(), "path"_a, "num_tokens"_a)
        .def("check_unchanged", &WordStarts::check_unchanged, NoGil());

    py::class_<BatchAssembler>(m, "BatchAssembler")
        .def(py::init([](const std::vector<std::shared_ptr<IndexedDataset>>& datasets,
                         std::shared_ptr<RowPlan> plan, std::int32_t cls_id, std::int32_t sep_id,
                         std::int32_t mask_id, std::int32_t pad_id, std::int32_t vocab_size,
                         const Array<std::int32_t>& special_ids,
                         const Array<std::uint8_t>& first_class,
                         const Array<std::uint8_t>& last_class,
                         const Array<std::uint8_t>& starts_word,
                         const std::vector<std::shared_ptr<WordStarts>>& word_starts,
                         std::vector<double> probabilities,
                         const std::string& unit, std::int64_t max_ngram, double mask_ratio,
                         double random_ratio, std::uint64_t seed) {
                 Masker masker({vocab_size, cls_id, sep_id, mask_id, pad_id, copy(special_ids)},
                               {mask_unit_of(unit), max_ngram, mask_ratio, random_ratio},
                               {copy(first_class), copy(last_class), copy(starts_word)});
                 return std::make_unique<BatchAssembler>(
                     corpus_files(datasets, word_starts), std::move(plan), std::move(masker),
                     std::move(probabilities), seed);
             }),
             "datasets"_a, "plan"_a, py::kw_only(), "cls_id"_a, "sep_id"_a, "mask_id"_a,
             "pad_id"_a, "vocab_size"_a, "special_ids"_a, "first_class"_a, "last_class"_a,
             "starts_word"_a, "word_starts"_a = std::vector<std::shared_ptr<WordStarts>>(),
             "probabilities"_a, "unit"_a, "max_ngram"_a, "mask_ratio"_a,
             "random_ratio"_a, "seed"_a)
        .def("fill", &fill, py::arg("rows").noconvert(), py::arg("tokens").noconvert(),
             py::arg("positions").noconvert(), py::arg("masked").noconvert(),
             py::arg("labels").noconvert(), py::arg("weights").noconvert());
}

Array<bool> insert(HashSet& set, const Array<std::uint64_t>& hashes) {
    if (hashes.ndim() != 2 || hashes.shape(1) != 2) {
        throw std::invalid_argument("hashes must have the shape [n, 2]");
    }
    const std::span<const std::uint64_t> words(hashes.data(),
                                               static_cast<std::size_t>(hashes.size()));
    Array<bool> is_new(hashes.shape(0));
    const std::span<bool> out(is_new.mutable_data(), static_cast<std::size_t>(is_new.size()));
    {
        const py::gil_scoped_release release;
        set.insert(words, out);
    }
    return is_new;
}

void bind_hash_set(py::module_& m) {
    py::class_<HashSet>(m, "HashSet")
        .def(py::init<>())
        .def("insert", &insert, py::arg("hashes").noconvert())
        .def("__len__", &HashSet::size, NoGil())
        .def_property_readonly("memory_bytes", &HashSet::memory_bytes);
}

}  // namespace

PYBIND11_MODULE(_megatron_bert_core, m) {
    m.doc() = "The C++ data core of megatron_bert.";
    m.attr("MAX_UNIT_TOKENS") = max_unit_tokens;
    m.attr("SOURCE_HASH") = DATA_CORE_SOURCE_HASH;
    py::register_exception<TokenIdError>(m, "TokenIdError", PyExc_RuntimeError);
    bind_indexed_dataset(m);
    bind_row_plan(m);
    bind_batch_assembler(m);
    bind_hash_set(m);
    bind_text(m);
}
