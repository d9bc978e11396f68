#include "batch.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "wide_vectors.h"

namespace megatron_bert {

namespace {

/// A 64-bit hash of an array, continuing from the hash of what precedes it. Four independent lanes
/// keep the processor's multipliers busy, as in XXH64 (Collet).
std::uint64_t hash_array(std::span<const std::int32_t> values, std::uint64_t previous) noexcept {
    constexpr std::size_t num_lanes = 4;
    constexpr std::uint64_t odd = 0xc2b2ae3d27d4eb4fU;
    std::uint64_t lanes[num_lanes];
    for (std::size_t lane = 0; lane < num_lanes; ++lane) {
        lanes[lane] = mix(previous + (lane + 1) * golden_step);
    }
    std::size_t next = 0;
    for (; next + 2 * num_lanes <= values.size(); next += 2 * num_lanes) {
        std::uint64_t words[num_lanes];
        std::memcpy(words, values.data() + next, sizeof(words));
        for (std::size_t lane = 0; lane < num_lanes; ++lane) {
            lanes[lane] = std::rotl(lanes[lane] ^ words[lane] * odd, 31) * golden_step;
        }
    }
    for (; next < values.size(); ++next) {
        const auto value = static_cast<std::uint32_t>(values[next]);
        lanes[next % num_lanes] = mix(lanes[next % num_lanes] ^ value * odd);
    }
    std::uint64_t hash = previous ^ values.size();
    for (const std::uint64_t lane : lanes) {
        hash = mix(hash * odd + lane);
    }
    return hash;
}

/// Segments count positions from 0, and so does the padding.
MEGATRON_BERT_WIDE_VECTORS
void count_positions(std::span<std::int32_t> positions) noexcept {
    for (std::size_t i = 0; i < positions.size(); ++i) {
        positions[i] = static_cast<std::int32_t>(i);
    }
}

/// The largest id, compared as unsigned, so that a negative id is larger than all others.
MEGATRON_BERT_WIDE_VECTORS
std::uint32_t largest_id(std::span<const std::int32_t> tokens) noexcept {
    std::uint32_t largest = 0;
    for (const std::int32_t token : tokens) {
        largest = std::max(largest, static_cast<std::uint32_t>(token));
    }
    return largest;
}

}  // namespace

BatchAssembler::BatchAssembler(std::vector<CorpusFiles> corpora,
                               std::shared_ptr<const RowPlan> plan, Masker masker,
                               std::vector<double> probabilities, std::uint64_t seed)
    : corpora_(std::move(corpora)),
      plan_(std::move(plan)),
      masker_(std::move(masker)),
      probabilities_(std::move(probabilities)),
      seed_(seed) {
    const bool matches = std::ranges::equal(
        plan_->corpora(), corpora_, [](const CorpusLengths& lengths, const CorpusFiles& files) {
            return lengths.are_of(*files.dataset) &&
                   (files.word_starts == nullptr ||
                    files.word_starts->num_tokens() == files.dataset->num_tokens());
        });
    if (!matches) {
        throw std::invalid_argument("the row plan or the word starts are not of these datasets");
    }
    if (probabilities_.size() != plan_->stages().size()) {
        throw std::invalid_argument(std::to_string(probabilities_.size()) +
                                    " masking probabilities for " +
                                    std::to_string(plan_->stages().size()) + " stages");
    }
    std::ranges::for_each(probabilities_, check_probability);
}

std::uint64_t BatchAssembler::fill(const BatchArrays& batch) const {
    Scratch scratch;
    std::uint64_t batch_hash = 0;
    find_segments(batch.rows.empty() ? surplus_row : batch.rows.front(), scratch.next_segments);
    for (std::size_t index = 0; index < batch.rows.size(); ++index) {
        // While a row is filled, the next row's tokens are prefetched.
        std::swap(scratch.segments, scratch.next_segments);
        find_segments(index + 1 < batch.rows.size() ? batch.rows[index + 1] : surplus_row,
                      scratch.next_segments);
        const std::size_t first_slot = index * batch.masked_slots;
        const RowArrays row{
            {batch.tokens + index * batch.seq_length, batch.seq_length},
            {batch.positions + index * batch.seq_length, batch.seq_length},
            {batch.masked + first_slot, batch.labels + first_slot, batch.weights + first_slot,
             batch.masked_slots}};
        if (batch.rows[index] == surplus_row) {
            fill_surplus(row);
        } else {
            batch_hash += fill_row(batch.rows[index], row, scratch);
        }
    }
    return batch_hash;
}

void BatchAssembler::find_segments(std::int64_t number, std::vector<Segment>& segments) const {
    if (number == surplus_row) {
        return;
    }
    plan_->segments(number, segments);
    for (const auto& [corpus, span] : segments) {
        corpora_[corpus].dataset->prefetch_tokens(span.document, span.offset, span.length);
    }
}

void BatchAssembler::fill_surplus(const RowArrays& row) const {
    std::ranges::fill(row.tokens, masker_.vocabulary().pad);
    count_positions(row.positions);
    clear_slots(row.slots, 0);
}

std::uint64_t BatchAssembler::fill_row(std::int64_t number, const RowArrays& row,
                                       Scratch& scratch) const {
    const double probability = probabilities_[stage_of(number, row.tokens.size())];
    write_segments(row, scratch);
    masker_.mask(row.tokens, scratch.texts, probability,
                 random_key(seed_, Purpose::masking, number), row.slots, scratch.masking);
    std::uint64_t hash = hash_array(row.tokens, 0);
    hash = hash_array(row.positions, hash);
    hash = hash_array({row.slots.positions, row.slots.size}, hash);
    return hash_array({row.slots.labels, row.slots.size}, hash);
}

void BatchAssembler::write_segments(const RowArrays& row, Scratch& scratch) const {
    scratch.texts.clear();
    scratch.word_starts.resize(row.tokens.size());
    std::size_t begin = 0;
    for (const Segment& segment : scratch.segments) {
        const auto length = static_cast<std::size_t>(segment.span.length);
        const std::span text = row.tokens.subspan(begin + 1, length);
        row.tokens[begin] = masker_.vocabulary().cls;
        const auto& [dataset, word_starts] = corpora_[segment.corpus];
        dataset->copy_tokens(segment.span.document, segment.span.offset, segment.span.length,
                             text.data());
        check_tokens(segment, text);
        row.tokens[begin + 1 + length] = masker_.vocabulary().sep;
        count_positions(row.positions.subspan(begin, length + 2));
        scratch.texts.push_back({begin + 1, length});
        if (word_starts != nullptr) {
            const std::span starts = std::span(scratch.word_starts).subspan(begin + 1, length);
            word_starts->copy(
                dataset->document_begin(segment.span.document) + segment.span.offset, starts);
            scratch.texts.back().word_starts = starts.data();
        }
        begin += length + 2;
    }
    std::ranges::fill(row.tokens.subspan(begin), masker_.vocabulary().pad);
    count_positions(row.positions.subspan(begin));
}

std::size_t BatchAssembler::stage_of(std::int64_t row, std::size_t seq_length) const {
    const std::size_t stage = plan_->stage_of(row).stage;
    const std::int64_t planned = plan_->stages()[stage].seq_length;
    if (planned != static_cast<std::int64_t>(seq_length)) {
        throw std::invalid_argument("row " + std::to_string(row) + " has " +
                                    std::to_string(planned) + " slots, the batch's rows have " +
                                    std::to_string(seq_length));
    }
    return stage;
}

void BatchAssembler::check_tokens(const Segment& segment,
                                  std::span<const std::int32_t> tokens) const {
    const std::uint32_t largest = largest_id(tokens);
    const auto size = static_cast<std::uint32_t>(masker_.vocabulary().size);
    if (largest >= size) {
        throw TokenIdError(corpora_[segment.corpus].dataset->prefix() + ".bin: document " +
                           std::to_string(segment.span.document) + " holds the token id " +
                           std::to_string(static_cast<std::int32_t>(largest)) +
                           ", but the vocabulary has " + std::to_string(size) + " ids");
    }
}

}  // namespace megatron_bert
