// The fuzz target in libFuzzer's form: clang++ -fsanitize=fuzzer,address,undefined.
#include "index_fuzz.h"

#include <cstdlib>
#include <stdexcept>

#include "dataset_index.h"

namespace megatron_bert::test {

namespace {

void require(bool holds) {
    if (!holds) {
        std::abort();
    }
}

void read_all(const DatasetIndex& index, std::uint64_t bin_bytes) {
    std::int64_t end = 0;
    for (std::int64_t document = 0; document < index.num_documents(); ++document) {
        const std::int64_t length = index.document_length(document);
        require(index.document_begin(document) == end && length >= 0);
        std::int64_t sentence_end = 0;
        for (const std::int64_t tokens : {std::int64_t{0}, length / 2, length}) {
            const std::int64_t found = index.last_sequence_end(document, tokens);
            require(found >= sentence_end && (found <= tokens || found == length));
            sentence_end = found;
        }
        end += length;
    }
    require(index.document_begin(index.num_documents()) == end && index.num_tokens() == end);
    require(static_cast<std::uint64_t>(end * bytes_of(index.token_type())) == bin_bytes);
    std::int64_t tokens = 0;
    for (std::int64_t sequence = 0; sequence < index.num_sequences(); ++sequence) {
        tokens += load<std::int32_t>(index.lengths_data() + 4 * sequence);
    }
    require(tokens == end);
}

}  // namespace

bool read_fuzzed_index(std::span<const std::uint8_t> input) {
    const auto bytes = std::as_bytes(input);
    if (bytes.size() < 8) {
        return false;
    }
    const auto bin_bytes = load<std::uint64_t>(bytes.data());
    try {
        read_all(DatasetIndex(bytes.subspan(8), bin_bytes, "fuzzed.idx"), bin_bytes);
    } catch (const std::runtime_error&) {
        return false;
    }
    return true;
}

}  // namespace megatron_bert::test

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    megatron_bert::test::read_fuzzed_index({data, size});
    return 0;
}
