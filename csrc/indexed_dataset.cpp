#include "indexed_dataset.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace megatron_bert {

namespace {

/// Widens `count` u16 tokens. The source may be the upper half of the destination: each token is
/// read before its place is overwritten.
void widen(const std::byte* source, std::size_t count, std::int32_t* tokens) noexcept {
    for (std::size_t i = 0; i < count; ++i) {
        tokens[i] = load<std::uint16_t>(source + i * 2);
    }
}

}  // namespace

IndexedDataset::IndexedDataset(std::string prefix, FileAccess access)
    : prefix_(std::move(prefix)),
      index_file_(prefix_ + ".idx", access),
      token_file_(prefix_ + ".bin", access),
      index_(index_file_.whole(), token_file_.size(), index_file_.path()) {
    // Rows take a few kilobytes from all over the file. With read-ahead the pages around them
    // displace others: as measured, a cold corpus of paragraphs then reads 7 times as much from
    // disk (90 times with a read-ahead of 8 MB), and a warm one is as fast either way.
    token_file_.expect_random_reads();
}

void IndexedDataset::prefetch_tokens(std::int64_t document, std::int64_t offset,
                                     std::int64_t length) const noexcept {
    // The processor's own prefetcher takes over after some cache lines.
    constexpr std::size_t line_bytes = 64;
    constexpr std::size_t most_bytes = 16 * line_bytes;
    const std::byte* mapped = token_file_.mapped();
    if (mapped == nullptr) {
        return;
    }
    const std::byte* source = mapped + byte_of(document, offset);
    const std::size_t bytes =
        std::min(static_cast<std::size_t>(length * bytes_of(token_type())), most_bytes);
    for (std::size_t byte = 0; byte < bytes; byte += line_bytes) {
        __builtin_prefetch(source + byte);
    }
}

void IndexedDataset::copy_tokens(std::int64_t document, std::int64_t offset, std::int64_t length,
                                 std::int32_t* tokens) const {
    if (length == 0) {
        return;  // `tokens` may be null for no tokens, which memcpy does not allow.
    }
    const auto count = static_cast<std::size_t>(length);
    const std::size_t begin = byte_of(document, offset);
    if (const std::byte* mapped = token_file_.mapped(); mapped != nullptr) {
        if (token_type() == TokenType::int32) {
            std::memcpy(tokens, mapped + begin, count * 4);
        } else {
            widen(mapped + begin, count, tokens);
        }
        return;
    }
    const auto bytes = std::as_writable_bytes(std::span(tokens, count));
    if (token_type() == TokenType::int32) {
        token_file_.read(begin, bytes);
    } else {
        const auto upper_half = bytes.subspan(count * 2);
        token_file_.read(begin, upper_half);
        widen(upper_half.data(), count, tokens);
    }
}

std::int64_t IndexedDataset::max_token_id(std::int64_t sample_documents) const {
    constexpr std::int64_t tokens_at_a_time = 1 << 14;
    std::vector<std::int32_t> tokens(tokens_at_a_time);
    const std::int64_t samples = std::clamp<std::int64_t>(sample_documents, 0, num_documents());
    std::int64_t largest = -1;
    for (std::int64_t sample = 0; sample < samples; ++sample) {
        const std::int64_t document = num_documents() / samples * sample +
                                      num_documents() % samples * sample / samples;
        const std::int64_t length = document_length(document);
        for (std::int64_t offset = 0; offset < length; offset += tokens_at_a_time) {
            const std::int64_t count = std::min(tokens_at_a_time, length - offset);
            copy_tokens(document, offset, count, tokens.data());
            for (std::int64_t i = 0; i < count; ++i) {
                const auto token = static_cast<std::uint32_t>(tokens[static_cast<std::size_t>(i)]);
                largest = std::max<std::int64_t>(largest, token);
            }
        }
    }
    return largest;
}

void IndexedDataset::check_unchanged() const {
    index_file_.check_unchanged();
    token_file_.check_unchanged();
}

}  // namespace megatron_bert
