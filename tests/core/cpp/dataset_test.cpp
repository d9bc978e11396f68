// The reader: mapped and not, damaged, and changed while in use.
#include <algorithm>
#include <filesystem>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "datasets.h"
#include "index_bytes.h"
#include "indexed_dataset.h"
#include "word_starts.h"

namespace megatron_bert::test {

namespace {

constexpr TokenType token_types[] = {TokenType::uint16, TokenType::int32};
constexpr FileAccess accesses[] = {FileAccess::map, FileAccess::read};

void every_range_of_every_document_is_read_mapped_or_not() {
    const TemporaryFolder folder;
    const std::string prefix = folder.path("set");
    for (const TokenType type : token_types) {
        for (const int most_sequences : {0, 3}) {
            const Content content = random_content(1, 40, most_sequences, 12, 0, 60000);
            write_dataset(prefix, type, content);
            for (const FileAccess access : accesses) {
                const IndexedDataset dataset(prefix, access);
                check(dataset.is_mapped() == (access == FileAccess::map));
                check_equal(dataset.num_tokens(), content.num_tokens());
                for (std::size_t number = 0; number < content.num_documents(); ++number) {
                    const std::vector<std::int32_t> expected = content.document(number);
                    const auto size = static_cast<std::int64_t>(expected.size());
                    const auto document = static_cast<std::int64_t>(number);
                    check_equal(dataset.document_length(document), size);
                    for (std::int64_t begin = 0; begin <= size; ++begin) {
                        std::vector<std::int32_t> tokens(static_cast<std::size_t>(size - begin));
                        dataset.prefetch_tokens(document, begin, size - begin);
                        dataset.copy_tokens(document, begin, size - begin, tokens.data());
                        check(std::equal(tokens.begin(), tokens.end(), expected.begin() + begin));
                    }
                }
            }
        }
    }
}

void the_largest_id_is_found_mapped_or_not() {
    const TemporaryFolder folder;
    Content content = random_content(2, 100, 2, 300, 0, 50000);
    content.sequences.back().assign(40'000, 7);
    content.sequences.back()[30'000] = 50001;
    for (const TokenType type : token_types) {
        write_dataset(folder.path("set"), type, content);
        for (const FileAccess access : accesses) {
            const IndexedDataset dataset(folder.path("set"), access);
            check_equal(dataset.max_token_id(1000), std::int64_t{50001});
            check_equal(dataset.max_token_id(0), std::int64_t{-1});
        }
    }
}

void an_empty_dataset_holds_nothing() {
    const TemporaryFolder folder;
    write_dataset(folder.path("set"), TokenType::int32, {{}, {0}});
    for (const FileAccess access : accesses) {
        const IndexedDataset dataset(folder.path("set"), access);
        check_equal(dataset.num_documents(), std::int64_t{0});
        check_equal(dataset.max_token_id(10), std::int64_t{-1});
    }
}

void an_index_cut_short_or_grown_is_refused() {
    const Content content = random_content(3, 9, 3, 5, 0, 99);
    std::vector<std::int32_t> lengths;
    for (const auto& sequence : content.sequences) {
        lengths.push_back(static_cast<std::int32_t>(sequence.size()));
    }
    std::vector<std::byte> bytes = index_bytes(TokenType::int32, lengths, content.boundaries);
    const auto bin_bytes = static_cast<std::uint64_t>(content.num_tokens()) * 4;
    check_equal(DatasetIndex(bytes, bin_bytes, "set.idx").num_tokens(), content.num_tokens());
    for (std::size_t size = 0; size < bytes.size(); ++size) {
        // In memory of just that size, so that a read beyond it is seen.
        const std::vector<std::byte> cut(bytes.begin(), bytes.begin() + static_cast<long>(size));
        check_throws<std::runtime_error>("set.idx: ",
                                         [&] { DatasetIndex(cut, bin_bytes, "set.idx"); });
    }
    for (const std::uint64_t other : {bin_bytes - 1, bin_bytes + 1, std::uint64_t{0}, ~bin_bytes}) {
        check_throws<std::runtime_error>("set.idx: ",
                                         [&] { DatasetIndex(bytes, other, "set.idx"); });
    }
    bytes.push_back(std::byte{0});
    check_throws<std::runtime_error>("1 bytes more",
                                     [&] { DatasetIndex(bytes, bin_bytes, "set.idx"); });
}

void sentence_ends_are_the_last_within_reach() {
    const std::vector<std::int32_t> lengths{3, 0, 4, 2, 5};
    const std::vector<std::int64_t> boundaries{0, 0, 4, 5};
    const std::vector<std::byte> bytes = index_bytes(TokenType::uint16, lengths, boundaries);
    const DatasetIndex index(bytes, 28, "set.idx");
    const std::int64_t expected[] = {0, 0, 0, 3, 3, 3, 3, 7, 7, 9, 9};
    for (std::int64_t tokens = 0; tokens < std::ssize(expected); ++tokens) {
        check_equal(index.last_sequence_end(1, tokens), expected[tokens]);
    }
    check_equal(index.last_sequence_end(0, 3), std::int64_t{0});
}

void a_file_that_ends_early_is_named_with_the_place() {
    const TemporaryFolder folder;
    const std::string prefix = folder.path("set");
    write_dataset(prefix, TokenType::int32, random_content(4, 1, 0, 100, 0, 99));
    const IndexedDataset dataset(prefix, FileAccess::read);
    const std::int64_t length = dataset.document_length(0);
    std::filesystem::resize_file(prefix + ".bin", 4);
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(length));
    dataset.copy_tokens(0, 0, 1, tokens.data());
    check_throws<std::runtime_error>("set.bin: ends at byte 4", [&] {
        dataset.copy_tokens(0, 0, length, tokens.data());
    });
}

void changes_of_either_file_are_told() {
    const TemporaryFolder folder;
    const std::string prefix = folder.path("set");
    const Content content = random_content(5, 9, 0, 20, 0, 99);
    for (const FileAccess access : accesses) {
        for (const std::string suffix : {".bin", ".idx"}) {
            const std::string path = prefix + suffix;
            const auto told = [&](const char* words, auto&& change) {
                write_dataset(prefix, TokenType::int32, content);
                const IndexedDataset dataset(prefix, access);
                dataset.check_unchanged();
                change();
                check_throws<std::runtime_error>(path + ": " + words,
                                                 [&] { dataset.check_unchanged(); });
            };
            told("was truncated", [&] { std::filesystem::resize_file(path, 40); });
            told("grew", [&] { std::filesystem::resize_file(path, 4000); });
            told("was modified", [&] {
                std::filesystem::last_write_time(path, std::filesystem::file_time_type::min());
            });
            told("was removed", [&] { std::filesystem::remove(path); });
            told("was replaced", [&] {
                std::filesystem::copy_file(path, path + ".new");
                std::filesystem::rename(path + ".new", path);
            });
        }
    }
}

void a_missing_file_is_named() {
    const TemporaryFolder folder;
    check_throws<std::system_error>("absent.idx", [&] { IndexedDataset(folder.path("absent")); });
}

void word_starts_are_the_bits_of_the_file_mapped_or_not() {
    const TemporaryFolder folder;
    constexpr std::int64_t num_tokens = 77;
    const auto starts = [](std::int64_t token) { return token * token % 7 < 3; };
    std::vector<std::byte> bits((num_tokens + 7) / 8);
    for (std::int64_t token = 0; token < num_tokens; ++token) {
        bits[static_cast<std::size_t>(token / 8)] |=
            static_cast<std::byte>(static_cast<unsigned>(starts(token)) << (token % 8));
    }
    write_file(folder.path("set.words"), bits);
    for (const FileAccess access : accesses) {
        const WordStarts words(folder.path("set.words"), num_tokens, access);
        for (std::int64_t begin = 0; begin <= num_tokens; ++begin) {
            for (std::int64_t end = begin; end <= num_tokens; ++end) {
                std::vector<std::uint8_t> found(static_cast<std::size_t>(end - begin), 9);
                words.copy(begin, found);
                for (std::int64_t token = begin; token < end; ++token) {
                    check(found[static_cast<std::size_t>(token - begin)] == starts(token));
                }
            }
        }
    }
    check_throws<std::runtime_error>("of another set",
                                     [&] { WordStarts(folder.path("set.words"), 81); });
}

constexpr Test tests[] = {
    {"every range of every document is read, mapped or not",
     every_range_of_every_document_is_read_mapped_or_not},
    {"the largest id is found, mapped or not", the_largest_id_is_found_mapped_or_not},
    {"an empty dataset holds nothing", an_empty_dataset_holds_nothing},
    {"an index cut short or grown is refused", an_index_cut_short_or_grown_is_refused},
    {"sentence ends are the last within reach", sentence_ends_are_the_last_within_reach},
    {"a file that ends early is named with the place",
     a_file_that_ends_early_is_named_with_the_place},
    {"changes of either file are told", changes_of_either_file_are_told},
    {"a missing file is named", a_missing_file_is_named},
    {"word starts are the bits of the file, mapped or not",
     word_starts_are_the_bits_of_the_file_mapped_or_not},
};

}  // namespace

std::span<const Test> dataset_tests() { return tests; }

}  // namespace megatron_bert::test
