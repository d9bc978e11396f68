// What fuzzing feeds to the reader of .idx files.
#pragma once

#include <cstdint>
#include <span>

namespace megatron_bert::test {

/// Reads an index and all that it says; whether it was taken for a valid one.
///
/// An input is the size of the .bin (u64 little endian), then the bytes of the .idx. Aborts if what
/// an accepted index says does not hold together.
bool read_fuzzed_index(std::span<const std::uint8_t> input);

}  // namespace megatron_bert::test
