#include "indexed_dataset.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace megatron_bert {

namespace {

TokenType token_type_of(std::uint8_t code, const std::string& path) {
    switch (code) {
        case static_cast<std::uint8_t>(TokenType::int32):
            return TokenType::int32;
        case static_cast<std::uint8_t>(TokenType::uint16):
            return TokenType::uint16;
        default:
            throw std::runtime_error(path + ": token type code " + std::to_string(code) +
                                     " is not one of 4 (int32) and 8 (uint16)");
    }
}

}  // namespace

IndexedDataset::IndexedDataset(std::string prefix)
    : prefix_(std::move(prefix)), index_(prefix_ + ".idx"), tokens_(prefix_ + ".bin") {
    read_header();
    check_sequences();
    check_documents();
}

void IndexedDataset::refuse(const std::string& what) const {
    throw std::runtime_error(prefix_ + ".idx: " + what);
}

void IndexedDataset::read_header() {
    using namespace index_format;
    const std::byte* data = index_.data();
    if (index_.size() < header_size || std::memcmp(data, magic, sizeof(magic)) != 0) {
        refuse("not an indexed dataset (its first bytes are not MMIDIDX and a header)");
    }
    if (const auto found = load<std::uint64_t>(data + version_offset); found != version) {
        refuse("format version " + std::to_string(found) + ", only version 1 is known");
    }
    token_type_ = token_type_of(load<std::uint8_t>(data + token_type_offset), prefix_ + ".idx");

    const auto num_sequences = load<std::uint64_t>(data + num_sequences_offset);
    const auto num_boundaries = load<std::uint64_t>(data + num_boundaries_offset);
    // Counts are compared through division, which no count in the file can make overflow.
    const std::uint64_t available = index_.size() - header_size;
    if (num_sequences > available / 12 || num_boundaries > (available - 12 * num_sequences) / 8) {
        refuse("truncated: " + std::to_string(index_.size()) + " bytes cannot hold " +
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

void IndexedDataset::check_sequences() {
    // The format's writers append, so each sequence starts where the one before ends. Relying on it
    // makes a document one run of tokens, and shows an index that belongs to other tokens.
    const auto token_size = static_cast<std::int64_t>(token_bytes());
    const auto bin_size = static_cast<std::int64_t>(tokens_.size());
    std::int64_t end = 0;
    for (std::int64_t sequence = 0; sequence < num_sequences_; ++sequence) {
        const std::int64_t length = sequence_length(sequence);
        if (length < 0) {
            refuse("sequence " + std::to_string(sequence) + " has length " +
                   std::to_string(length));
        }
        if (sequence_offset(sequence) != end) {
            refuse("sequence " + std::to_string(sequence) + " starts at byte " +
                   std::to_string(sequence_offset(sequence)) + " of the .bin, expected " +
                   std::to_string(end));
        }
        if (length > (bin_size - end) / token_size) {
            refuse("sequence " + std::to_string(sequence) + " ends beyond the " +
                   std::to_string(bin_size) + " bytes of the .bin (truncated, or of another set)");
        }
        end += length * token_size;
    }
    if (end != bin_size) {
        refuse("describes " + std::to_string(end) + " bytes of tokens, but the .bin has " +
               std::to_string(bin_size) + " (grown, or of another set)");
    }
    num_tokens_ = end / token_size;
}

void IndexedDataset::check_documents() {
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

std::int64_t IndexedDataset::last_sequence_end(std::int64_t document,
                                               std::int64_t tokens) const noexcept {
    // Sequences are contiguous: each but the first begins where one ends.
    const std::int64_t target = document_begin(document) + tokens;
    std::int64_t first = boundary(document);
    std::int64_t last = boundary(document + 1);
    if (first == last || target >= document_begin(document + 1)) {
        return document_length(document);
    }
    while (last - first > 1) {
        const std::int64_t middle = first + (last - first) / 2;
        (sequence_offset(middle) / token_bytes() <= target ? first : last) = middle;
    }
    return sequence_offset(first) / token_bytes() - document_begin(document);
}

void IndexedDataset::prefetch_tokens(std::int64_t document, std::int64_t offset,
                                     std::int64_t length) const noexcept {
    // The processor's own prefetcher takes over after some lines.
    constexpr std::int64_t line_bytes = 64;
    constexpr std::int64_t most_bytes = 16 * line_bytes;
    const std::int64_t bytes = std::min(length * token_bytes(), most_bytes);
    const std::byte* source = tokens_.data() + (document_begin(document) + offset) * token_bytes();
    for (std::int64_t byte = 0; byte < bytes; byte += line_bytes) {
        __builtin_prefetch(source + byte);
    }
}

void IndexedDataset::copy_tokens(std::int64_t document, std::int64_t offset, std::int64_t length,
                                 std::int32_t* tokens) const noexcept {
    if (length == 0) {
        return;  // An empty .bin is not mapped: there is no address to copy from.
    }
    const auto count = static_cast<std::size_t>(length);
    const std::byte* source = tokens_.data() + (document_begin(document) + offset) * token_bytes();
    if (token_type_ == TokenType::int32) {
        std::memcpy(tokens, source, count * 4);
        return;
    }
    for (std::size_t i = 0; i < count; ++i) {
        tokens[i] = load<std::uint16_t>(source + i * 2);
    }
}

std::int64_t IndexedDataset::max_token_id(std::int64_t sample_documents) const noexcept {
    const std::int64_t samples = std::clamp<std::int64_t>(sample_documents, 0, num_documents_);
    std::int64_t largest = -1;
    for (std::int64_t sample = 0; sample < samples; ++sample) {
        const std::int64_t document = num_documents_ / samples * sample +
                                      num_documents_ % samples * sample / samples;
        const std::byte* source = tokens_.data() + document_begin(document) * token_bytes();
        const std::int64_t length = document_length(document);
        for (std::int64_t i = 0; i < length; ++i) {
            const std::uint32_t token = token_type_ == TokenType::int32
                                            ? load<std::uint32_t>(source + i * 4)
                                            : load<std::uint16_t>(source + i * 2);
            largest = std::max<std::int64_t>(largest, token);
        }
    }
    return largest;
}

}  // namespace megatron_bert
