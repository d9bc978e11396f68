#include "dataset_index.h"

#include <array>
#include <stdexcept>
#include <utility>

namespace megatron_bert {

namespace {

/// Names of the format's token types by their code.
constexpr std::array type_names{"unknown",  "uint8",   "int8",    "int16", "int32",
                                "int64", "float64", "float32", "uint16"};

std::string describe_type(std::uint8_t code) {
    return std::to_string(code) + " (" +
           type_names[code < type_names.size() ? code : 0] + ")";
}

}  // namespace

DatasetIndex::DatasetIndex(std::span<const std::byte> bytes, std::uint64_t bin_bytes,
                           std::string path)
    : path_(std::move(path)) {
    read_header(bytes);
    check_sequences(bin_bytes);
    check_documents();
}

void DatasetIndex::refuse(const std::string& what) const {
    throw std::runtime_error(path_ + ": " + what);
}

void DatasetIndex::read_header(std::span<const std::byte> bytes) {
    using namespace index_format;
    const std::byte* data = bytes.data();
    if (bytes.size() < header_size || std::memcmp(data, magic, sizeof(magic)) != 0) {
        refuse("not an indexed dataset (its first bytes are not MMIDIDX and a header)");
    }
    if (const auto found = load<std::uint64_t>(data + version_offset); found != version) {
        refuse("format version " + std::to_string(found) + ", only version 1 is known");
    }
    const auto type_code = load<std::uint8_t>(data + token_type_offset);
    token_type_ = static_cast<TokenType>(type_code);
    if (token_type_ != TokenType::int32 && token_type_ != TokenType::uint16) {
        refuse("token type code " + describe_type(type_code) +
               " is not one of 4 (int32) and 8 (uint16), the types of text");
    }

    const auto num_sequences = load<std::uint64_t>(data + num_sequences_offset);
    const auto num_boundaries = load<std::uint64_t>(data + num_boundaries_offset);
    // Compare counts by division, so that no count in the file can cause an overflow.
    const std::uint64_t available = bytes.size() - header_size;
    if (num_sequences > available / 12 || num_boundaries > (available - 12 * num_sequences) / 8) {
        refuse("truncated: " + std::to_string(bytes.size()) + " bytes cannot hold " +
               std::to_string(num_sequences) + " sequences and " + std::to_string(num_boundaries) +
               " document boundaries");
    }
    const std::uint64_t surplus = available - 12 * num_sequences - 8 * num_boundaries;
    if (num_sequences > 0 && surplus == num_sequences) {
        refuse("a multimodal dataset (it stores a mode for each sequence); only text is supported");
    }
    if (surplus != 0) {
        refuse(std::to_string(surplus) + " bytes more than its counts say");
    }
    if (num_boundaries == 0) {
        refuse("no document boundaries (even an empty dataset has one)");
    }
    num_sequences_ = static_cast<std::int64_t>(num_sequences);
    num_documents_ = static_cast<std::int64_t>(num_boundaries) - 1;
    lengths_ = data + header_size;
    offsets_ = lengths_ + 4 * num_sequences_;
    boundaries_ = offsets_ + 8 * num_sequences_;
}

void DatasetIndex::check_sequences(std::uint64_t bin_bytes) {
    // The format's writers append, so each sequence starts where the one before ends. Requiring
    // this makes a document one run of tokens, and reveals an index that belongs to another .bin.
    const std::int64_t token_bytes = bytes_of(token_type_);
    const auto bin_size = static_cast<std::int64_t>(bin_bytes);
    std::int64_t end = 0;
    for (std::int64_t sequence = 0; sequence < num_sequences_; ++sequence) {
        const std::int64_t length = sequence_length(sequence);
        if (length < 0) {
            refuse("sequence " + std::to_string(sequence) + " has length " +
                   std::to_string(length));
        }
        if (sequence_offset(sequence) != end) {
            refuse("sequence " + std::to_string(sequence) + " starts at byte " +
                   std::to_string(sequence_offset(sequence)) + " of the .bin, but the one before " +
                   "ends at byte " + std::to_string(end) + " (sequences must be contiguous)");
        }
        if (length > (bin_size - end) / token_bytes) {
            refuse("sequence " + std::to_string(sequence) + " ends beyond the " +
                   std::to_string(bin_size) + " bytes of the .bin (truncated, or of another set)");
        }
        end += length * token_bytes;
    }
    if (end != bin_size) {
        refuse("describes " + std::to_string(end) + " bytes of tokens, but the .bin has " +
               std::to_string(bin_size) + " (grown, or of another set)");
    }
    num_tokens_ = end / token_bytes;
}

void DatasetIndex::check_documents() {
    if (boundary(0) != 0 || boundary(num_documents_) != num_sequences_) {
        refuse("document boundaries run from " + std::to_string(boundary(0)) + " to " +
               std::to_string(boundary(num_documents_)) + ", expected 0 to " +
               std::to_string(num_sequences_));
    }
    one_sequence_per_document_ = num_documents_ == num_sequences_;
    for (std::int64_t document = 0; document < num_documents_; ++document) {
        const std::int64_t begin = boundary(document);
        const std::int64_t end = boundary(document + 1);
        if (end < begin || end > num_sequences_) {
            refuse("document boundary " + std::to_string(document + 1) + " is " +
                   std::to_string(end) + ", after " + std::to_string(begin) + " and with " +
                   std::to_string(num_sequences_) + " sequences");
        }
        one_sequence_per_document_ = one_sequence_per_document_ && end - begin == 1;
    }
}

std::int64_t DatasetIndex::last_sequence_end(std::int64_t document,
                                             std::int64_t tokens) const noexcept {
    // Sequences are contiguous: each one but the first begins where another ends.
    const std::int64_t target = document_begin(document) + tokens;
    std::int64_t first = boundary(document);
    std::int64_t last = boundary(document + 1);
    if (first == last || target >= document_begin(document + 1)) {
        return document_length(document);
    }
    while (last - first > 1) {
        const std::int64_t middle = first + (last - first) / 2;
        (sequence_offset(middle) / bytes_of(token_type_) <= target ? first : last) = middle;
    }
    return sequence_offset(first) / bytes_of(token_type_) - document_begin(document);
}

}  // namespace megatron_bert
