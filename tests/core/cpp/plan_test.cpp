// Blends and row plans, also looked up by several threads at once.
#include <algorithm>
#include <cmath>
#include <future>
#include <map>
#include <memory>
#include <vector>

#include "blend.h"
#include "check.h"
#include "datasets.h"
#include "indexed_dataset.h"
#include "row_plan.h"

namespace megatron_bert::test {

namespace {

std::vector<std::int32_t> random_lengths(std::uint64_t seed, int num_documents, int most_tokens) {
    CounterRandom random(seed);
    std::vector<std::int32_t> lengths;
    for (int document = 0; document < num_documents; ++document) {
        lengths.push_back(
            static_cast<std::int32_t>(random.below(static_cast<std::uint64_t>(most_tokens) + 1)));
    }
    return lengths;
}

/// Counts how often a plan reads each token of a corpus, by the document's number in its dataset,
/// and checks that rows are not overfull.
std::map<std::int64_t, std::vector<int>> times_read(const RowPlan& plan, std::size_t corpus) {
    const CorpusLengths& lengths = plan.corpora()[corpus];
    std::map<std::int64_t, std::vector<int>> times;
    for (std::int64_t document = 0; document < lengths.num_documents(); ++document) {
        times[lengths.number_of(document)].resize(static_cast<std::size_t>(lengths[document]));
    }
    std::vector<Segment> segments;
    for (std::int64_t row = 0; row < plan.num_rows(); ++row) {
        plan.segments(row, segments);
        std::int64_t slots = 0;
        for (const Segment& segment : segments) {
            slots += segment.span.length + 2;
            for (std::int64_t i = 0; i < segment.span.length && segment.corpus == corpus; ++i) {
                ++times.at(segment.span.document)
                      .at(static_cast<std::size_t>(segment.span.offset + i));
            }
        }
        check(slots <= plan.stages()[plan.stage_of(row).stage].seq_length);
    }
    return times;
}

/// Checks that every epoch but the last, which the run may leave in the middle, is whole.
void check_whole_epochs(const RowPlan& plan, std::size_t corpus) {
    int least = -1;
    int most = 0;
    for (const auto& [number, document] : times_read(plan, corpus)) {
        for (const int times : document) {
            least = least < 0 ? times : std::min(least, times);
            most = std::max(most, times);
        }
    }
    check(most - least <= 1);
    check(most >= 1);
}

void every_epoch_reads_each_token_once_over_all_stages() {
    const std::vector<std::int32_t> lengths[] = {
        random_lengths(1, 3000, 60), random_lengths(2, 9000, 6), random_lengths(3, 5, 4000)};
    std::vector<CorpusLengths> corpora;
    for (const auto& corpus : lengths) {
        corpora.emplace_back(std::span(corpus), nullptr);
    }
    const RowPlan plan(corpora, {1.0, 2.5, 0.25}, {{32, 5000}, {7, 0}, {128, 3000}, {9, 2000}}, 7);
    for (std::size_t corpus = 0; corpus < corpora.size(); ++corpus) {
        check_whole_epochs(plan, corpus);
    }
}

void rows_cut_at_sentence_ends_read_each_token_once() {
    const TemporaryFolder folder;
    write_dataset(folder.path("set"), TokenType::uint16, random_content(4, 500, 6, 30, 0, 99));
    const auto dataset = std::make_shared<const IndexedDataset>(folder.path("set"));
    const RowPlan plan({CorpusLengths(dataset)}, {1.0}, {{64, 700}, {32, 900}}, 3);
    check_whole_epochs(plan, 0);
}

void both_sides_of_a_held_out_split_together_are_the_corpus() {
    const TemporaryFolder folder;
    write_dataset(folder.path("set"), TokenType::uint16, random_content(5, 600, 0, 30, 0, 99));
    const auto dataset = std::make_shared<const IndexedDataset>(folder.path("set"));
    const CorpusLengths held_out(dataset, {0.2, true});
    const CorpusLengths rest(dataset, {0.2, false});
    check_equal(held_out.num_tokens() + rest.num_tokens(), dataset->num_tokens());
    std::int64_t next_held_out = 0;
    for (std::int64_t document = 0; document < dataset->num_documents(); ++document) {
        const bool is_held_out = next_held_out < held_out.num_documents() &&
                                 held_out.number_of(next_held_out) == document;
        const std::int64_t length = is_held_out ? held_out[next_held_out++] : rest[document];
        check_equal(length, dataset->document_length(document));
        check(!is_held_out || rest[document] == 0);
    }
    check_equal(next_held_out, held_out.num_documents());
    check_whole_epochs(RowPlan({held_out}, {1.0}, {{32, 200}}, 1), 0);
}

void a_blend_gives_each_corpus_its_share_all_along() {
    const std::vector<double> weights_of[] = {
        {1.0}, {1.0, 1.0}, {3.0, 1.0, 0.001}, {1e300, 1e299, 5e299, 1e-300}};
    for (const auto& weights : weights_of) {
        constexpr std::int64_t rows = 5000;
        const Blend blend(weights, rows);
        double sum = 0;
        for (const double weight : weights) {
            sum += weight / 1e300;
        }
        std::vector<std::int64_t> counts(weights.size());
        for (std::int64_t row = 0; row < rows; ++row) {
            const Blend::Choice choice = blend(row);
            check_equal(choice.row, counts.at(choice.corpus)++);
            for (std::size_t corpus = 0; corpus < weights.size(); ++corpus) {
                const double share = weights[corpus] / 1e300 / sum * static_cast<double>(row + 1);
                check(std::abs(static_cast<double>(counts[corpus]) - share) <=
                      static_cast<double>(weights.size()));
            }
        }
        check(counts == blend.totals());
    }
}

void rows_are_the_same_looked_up_by_several_threads() {
    const std::vector<std::int32_t> lengths = random_lengths(6, 20'000, 40);
    // As many threads plan as there are corpora.
    const std::vector<CorpusLengths> corpora(6, CorpusLengths(std::span(lengths), nullptr));
    const RowPlan plan(corpora, std::vector(corpora.size(), 1.0), {{48, 20'000}}, 1);
    const auto hash_rows = [&plan](std::int64_t first) {
        std::uint64_t hash = 0;
        std::vector<Segment> segments;
        for (std::int64_t row = first; row < plan.num_rows(); row += 7) {
            plan.segments(row, segments);
            for (const auto& [corpus, span] : segments) {
                hash = mix(hash + random_key(corpus, Purpose::row_order, span.document, span.offset,
                                             span.length));
            }
        }
        return hash;
    };
    std::vector<std::future<std::uint64_t>> hashes;
    for (std::int64_t thread = 0; thread < 8; ++thread) {
        hashes.push_back(std::async(std::launch::async, hash_rows, thread % 4));
    }
    for (std::int64_t thread = 0; thread < 8; ++thread) {
        check_equal(hashes[static_cast<std::size_t>(thread)].get(), hash_rows(thread % 4));
    }
}

constexpr Test tests[] = {
    {"every epoch reads each token once, over all stages",
     every_epoch_reads_each_token_once_over_all_stages},
    {"rows cut at sentence ends read each token once",
     rows_cut_at_sentence_ends_read_each_token_once},
    {"both sides of a held-out split together are the corpus",
     both_sides_of_a_held_out_split_together_are_the_corpus},
    {"a blend gives each corpus its share all along",
     a_blend_gives_each_corpus_its_share_all_along},
    {"rows are the same looked up by several threads",
     rows_are_the_same_looked_up_by_several_threads},
};

}  // namespace

std::span<const Test> plan_tests() { return tests; }

}  // namespace megatron_bert::test
