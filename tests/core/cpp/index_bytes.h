// Indices, field by field as Megatron-LM's format has them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "dataset_index.h"

namespace megatron_bert::test {

template <typename T>
void append(std::vector<std::byte>& bytes, T value) {
    const auto view = std::as_bytes(std::span(&value, 1));
    bytes.insert(bytes.end(), view.begin(), view.end());
}

inline std::vector<std::byte> index_bytes(TokenType type, std::span<const std::int32_t> lengths,
                                          std::span<const std::int64_t> boundaries) {
    std::vector<std::byte> bytes;
    for (const char letter : index_format::magic) {
        append(bytes, letter);
    }
    append(bytes, index_format::version);
    append(bytes, type);
    append(bytes, std::uint64_t{lengths.size()});
    append(bytes, std::uint64_t{boundaries.size()});
    for (const std::int32_t length : lengths) {
        append(bytes, length);
    }
    std::int64_t offset = 0;
    for (const std::int32_t length : lengths) {
        append(bytes, offset);
        offset += length * bytes_of(type);
    }
    for (const std::int64_t boundary : boundaries) {
        append(bytes, boundary);
    }
    return bytes;
}

}  // namespace megatron_bert::test
