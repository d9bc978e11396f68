// Drives the fuzz target where there is no libFuzzer: mutations of valid indices, the same ones
// each time. `index_fuzz INPUTS` reads that many.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "index_bytes.h"
#include "index_fuzz.h"
#include "random.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using namespace megatron_bert;
using Input = std::vector<std::uint8_t>;

std::size_t below(CounterRandom& random, std::size_t bound) {
    return static_cast<std::size_t>(random.below(bound));
}

/// A valid index, with several sequences a document or one, and before it the size of its .bin.
Input valid_input(CounterRandom& random) {
    const TokenType type = random.below(2) == 0 ? TokenType::int32 : TokenType::uint16;
    std::vector<std::int32_t> lengths(below(random, 7));
    std::int64_t num_tokens = 0;
    for (std::int32_t& length : lengths) {
        // Rarely long ones, for sums beyond 32 bits.
        length = static_cast<std::int32_t>(random.below(random.below(4) == 0 ? 1U << 31 : 4));
        num_tokens += length;
    }
    const auto num_sequences = static_cast<std::int64_t>(lengths.size());
    std::vector<std::int64_t> boundaries{0};
    while (boundaries.back() < num_sequences) {
        const std::uint64_t step = random.below(4) == 0 ? random.below(3) : 1;
        boundaries.push_back(
            std::min(boundaries.back() + static_cast<std::int64_t>(step), num_sequences));
    }
    std::vector<std::byte> bytes;
    test::append(bytes, static_cast<std::uint64_t>(num_tokens * bytes_of(type)));
    const auto index = test::index_bytes(type, lengths, boundaries);
    bytes.insert(bytes.end(), index.begin(), index.end());
    Input input;
    for (const std::byte byte : bytes) {
        input.push_back(static_cast<std::uint8_t>(byte));
    }
    return input;
}

/// Overwrites up to eight bytes with a number at the edge of some type's range.
void write_number(Input& input, CounterRandom& random) {
    constexpr std::uint64_t numbers[] = {0,          1,          2,          0x7f,       0xff,
                                         0x7fffffff, 0x80000000, 0xffffffff, 1ULL << 60, 1ULL << 61,
                                         1ULL << 62, 1ULL << 63, ~0ULL,      ~0ULL / 12, ~0ULL / 8};
    const std::uint64_t number = numbers[below(random, std::size(numbers))] + random.below(3) - 1;
    const std::size_t begin = below(random, input.size());
    const std::size_t size = std::min(input.size() - begin, std::size_t{1} << random.below(4));
    for (std::size_t i = 0; i < size; ++i) {
        input[begin + i] = static_cast<std::uint8_t>(number >> (8 * i));
    }
}

void mutate(Input& input, CounterRandom& random) {
    if (input.empty()) {
        return;
    }
    const std::size_t place = below(random, input.size());
    const auto at = input.begin() + static_cast<std::ptrdiff_t>(place);
    switch (random.below(6)) {
        case 0:
            input[place] ^= static_cast<std::uint8_t>(1U << random.below(8));
            break;
        case 1:
            input[place] = static_cast<std::uint8_t>(random.below(256));
            break;
        case 2:
            write_number(input, random);
            break;
        case 3:
            input.resize(place);
            break;
        case 4:
            input.insert(at, below(random, 20), static_cast<std::uint8_t>(random.below(2)));
            break;
        default:
            input.erase(at, at + static_cast<std::ptrdiff_t>(
                                     std::min(input.size() - place, below(random, 20))));
            break;
    }
}

}  // namespace

int main(int argc, char** argv) {
    const long num_inputs = argc > 1 ? std::atol(argv[1]) : 100'000;
    long num_accepted = 0;
    for (long number = 0; number < num_inputs; ++number) {
        CounterRandom random(static_cast<std::uint64_t>(number));
        Input input = valid_input(random);
        for (std::uint64_t left = random.below(4); left > 0; --left) {
            mutate(input, random);
        }
        // A copy that ends where its memory does, so that a read beyond it is seen.
        const Input exact(input);
        LLVMFuzzerTestOneInput(exact.data(), exact.size());
        num_accepted += test::read_fuzzed_index(exact) ? 1 : 0;
    }
    std::printf("%ld inputs, %ld of them valid indices\n", num_inputs, num_accepted);
    // Were all refused, or none, the reader would not have been put to the test.
    return num_accepted > num_inputs / 10 && num_accepted < num_inputs ? 0 : 1;
}
