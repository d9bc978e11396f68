// What the tests of the data core are made of: checks that throw, and lists of named functions.
#pragma once

#include <concepts>
#include <exception>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

namespace megatron_bert::test {

/// A test: its name is the sentence that it proves.
struct Test {
    std::string_view name;
    void (*run)();
};

/// A place in a source file; std::source_location needs newer compilers than the data core does.
struct Place {
    const char* file;
    int line;

    static Place current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

[[noreturn]] inline void fail(const std::string& what, Place where) {
    throw std::logic_error(std::string(where.file) + ":" + std::to_string(where.line) +
                           ": " + what);
}

inline void check(bool holds, Place where = Place::current()) {
    if (!holds) {
        fail("does not hold", where);
    }
}

template <std::integral Number>
void check_equal(Number found, Number expected,
                 Place where = Place::current()) {
    if (found != expected) {
        fail("found " + std::to_string(found) + ", expected " + std::to_string(expected), where);
    }
}

/// Checks that `function` throws an `Error` whose message holds `words`.
template <typename Error, std::invocable Function>
void check_throws(std::string_view words, Function&& function,
                  Place where = Place::current()) {
    std::string found = "nothing";
    try {
        function();
    } catch (const Error& error) {
        found = error.what();
        if (found.find(words) != std::string::npos) {
            return;
        }
    }
    fail("thrown is " + found + ", expected " + std::string(words), where);
}

std::span<const Test> dataset_tests();
std::span<const Test> plan_tests();
std::span<const Test> batch_tests();

}  // namespace megatron_bert::test
