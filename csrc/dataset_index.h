// The .idx file of Megatron-LM's indexed datasets: where each sequence and each document begins.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>

namespace megatron_bert {

static_assert(std::endian::native == std::endian::little,
              "the .idx and .bin formats are little endian and are read in place");

/// Layout of a .idx file: the header, then three arrays, unaligned.
///
///     0   "MMIDIDX\0\0"        9   u64 version        17  u8 token type
///     18  u64 N sequences      26  u64 D boundaries   34  i32[N] sequence lengths in tokens
///     then i64[N] byte offsets into .bin, then i64[D] document boundaries as sequence numbers
///     (the first is 0, the last N), then, in multimodal sets only, i8[N] modes.
namespace index_format {
inline constexpr char magic[] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', '\0', '\0'};
inline constexpr std::uint64_t version = 1;
inline constexpr std::size_t version_offset = sizeof(magic);
inline constexpr std::size_t token_type_offset = 17;
inline constexpr std::size_t num_sequences_offset = 18;
inline constexpr std::size_t num_boundaries_offset = 26;
inline constexpr std::size_t header_size = 34;
}  // namespace index_format

/// Token types by their code in the .idx file. Megatron-LM writes text as one of these two.
enum class TokenType : std::uint8_t { int32 = 4, uint16 = 8 };

constexpr std::int64_t bytes_of(TokenType type) noexcept {
    return type == TokenType::int32 ? 4 : 2;
}

/// Reads a value from an address of any alignment.
template <typename T>
T load(const std::byte* address) noexcept {
    T value;
    std::memcpy(&value, address, sizeof(T));
    return value;
}

/// An index, checked once and read in place.
///
/// Everything that later reads rely on is checked here, so that a damaged or unrelated file is
/// refused and nothing is ever read out of bounds. Const methods are thread-safe.
class DatasetIndex {
  public:
    /// Views `bytes`, the whole file, which must outlive the object. `bin_bytes` is the size of the
    /// .bin that it describes.
    ///
    /// Throws std::runtime_error, naming `path` and what is wrong, if it is not an index of text or
    /// does not belong to that .bin.
    DatasetIndex(std::span<const std::byte> bytes, std::uint64_t bin_bytes, std::string path);

    std::int64_t num_documents() const noexcept { return num_documents_; }
    std::int64_t num_sequences() const noexcept { return num_sequences_; }
    std::int64_t num_tokens() const noexcept { return num_tokens_; }
    TokenType token_type() const noexcept { return token_type_; }

    /// Whether every document is one sequence, which makes `lengths_data` the documents' lengths.
    bool one_sequence_per_document() const noexcept { return one_sequence_per_document_; }

    /// The stored i32 sequence lengths, at any alignment.
    const std::byte* lengths_data() const noexcept { return lengths_; }

    /// Tokens of a document: all its sequences joined.
    std::int64_t document_length(std::int64_t document) const noexcept {
        return one_sequence_per_document_ ? sequence_length(document)
                                          : document_begin(document + 1) - document_begin(document);
    }

    /// Number of the document's first token within .bin; for `num_documents()`, the end of .bin.
    std::int64_t document_begin(std::int64_t document) const noexcept {
        const std::int64_t sequence = one_sequence_per_document_ ? document : boundary(document);
        return sequence == num_sequences_ ? num_tokens_
                                          : sequence_offset(sequence) / bytes_of(token_type_);
    }

    /// The last end of a sequence (a sentence, if the dataset has them) within a document's first
    /// `tokens` tokens, counted in tokens from the document's beginning; 0 if there is none.
    std::int64_t last_sequence_end(std::int64_t document, std::int64_t tokens) const noexcept;

  private:
    void read_header(std::span<const std::byte> bytes);
    void check_sequences(std::uint64_t bin_bytes);
    void check_documents();
    [[noreturn]] void refuse(const std::string& what) const;

    std::int32_t sequence_length(std::int64_t sequence) const noexcept {
        return load<std::int32_t>(lengths_ + sequence * 4);
    }
    std::int64_t sequence_offset(std::int64_t sequence) const noexcept {
        return load<std::int64_t>(offsets_ + sequence * 8);
    }
    std::int64_t boundary(std::int64_t document) const noexcept {
        return load<std::int64_t>(boundaries_ + document * 8);
    }

    std::string path_;
    TokenType token_type_{};
    std::int64_t num_sequences_ = 0;
    std::int64_t num_documents_ = 0;
    std::int64_t num_tokens_ = 0;
    bool one_sequence_per_document_ = true;
    const std::byte* lengths_ = nullptr;
    const std::byte* offsets_ = nullptr;
    const std::byte* boundaries_ = nullptr;
};

}  // namespace megatron_bert
