// Runs the tests of the data core; the exit code is 1 if one fails.
#include <cstdio>
#include <exception>

#include "check.h"

int main() {
    using namespace megatron_bert::test;
    int num_tests = 0;
    int num_failed = 0;
    for (const auto& tests : {dataset_tests(), plan_tests(), batch_tests()}) {
        for (const Test& test : tests) {
            ++num_tests;
            try {
                test.run();
            } catch (const std::exception& error) {
                ++num_failed;
                std::printf("FAILED %.*s\n  %s\n", static_cast<int>(test.name.size()),
                            test.name.data(), error.what());
            }
        }
    }
    std::printf("%d tests, %d failed\n", num_tests, num_failed);
    return num_failed == 0 ? 0 : 1;
}
