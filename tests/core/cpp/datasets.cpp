#include "datasets.h"

#include <cstdlib>
#include <fstream>
#include <stdexcept>

#include "index_bytes.h"
#include "random.h"

namespace megatron_bert::test {

TemporaryFolder::TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "data-core-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) {
        throw std::runtime_error("cannot make a folder like " + name);
    }
    folder_ = name;
}

TemporaryFolder::~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
}

void write_file(const std::string& path, std::span<const std::byte> bytes) {
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    file.write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
    if (!file.flush()) {
        throw std::runtime_error("cannot write " + path);
    }
}

std::vector<std::int32_t> Content::document(std::size_t number) const {
    std::vector<std::int32_t> tokens;
    for (auto i = static_cast<std::size_t>(boundaries[number]);
         i < static_cast<std::size_t>(boundaries[number + 1]); ++i) {
        tokens.insert(tokens.end(), sequences[i].begin(), sequences[i].end());
    }
    return tokens;
}

std::int64_t Content::num_tokens() const {
    std::int64_t count = 0;
    for (const auto& sequence : sequences) {
        count += static_cast<std::int64_t>(sequence.size());
    }
    return count;
}

Content random_content(std::uint64_t seed, int num_documents, int most_sequences, int most_tokens,
                       std::int32_t first_id, std::int32_t vocab_size) {
    CounterRandom random(seed);
    const auto below = [&random](int bound) {
        return static_cast<int>(random.below(static_cast<std::uint64_t>(bound)));
    };
    Content content;
    content.boundaries.push_back(0);
    for (int document = 0; document < num_documents; ++document) {
        const int num_sequences = most_sequences == 0 ? 1 : below(most_sequences + 1);
        for (int sequence = 0; sequence < num_sequences; ++sequence) {
            std::vector<std::int32_t>& tokens = content.sequences.emplace_back();
            for (int left = below(most_tokens + 1); left > 0; --left) {
                tokens.push_back(first_id + below(vocab_size - first_id));
            }
        }
        content.boundaries.push_back(static_cast<std::int64_t>(content.sequences.size()));
    }
    return content;
}

void write_dataset(const std::string& prefix, TokenType type, const Content& content) {
    std::vector<std::int32_t> lengths;
    std::vector<std::byte> tokens;
    for (const auto& sequence : content.sequences) {
        lengths.push_back(static_cast<std::int32_t>(sequence.size()));
        for (const std::int32_t token : sequence) {
            if (type == TokenType::int32) {
                append(tokens, token);
            } else {
                append(tokens, static_cast<std::uint16_t>(token));
            }
        }
    }
    write_file(prefix + ".idx", index_bytes(type, lengths, content.boundaries));
    write_file(prefix + ".bin", tokens);
}

}  // namespace megatron_bert::test
