#include "batch.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

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
void count_positions(std::span<std::int32_t> positions) noexcept {
    std::iota(positions.begin(), positions.end(), 0);
}

}  // namespace

BatchAssembler::BatchAssembler(std::vector<std::shared_ptr<const IndexedDataset>> datasets,
                               std::shared_ptr<const RowPlan> plan, Masker masker,
                               std::uint64_t seed)
    : datasets_(std::move(datasets)),
      plan_(std::move(plan)),
      masker_(std::move(masker)),
      seed_(seed) {
    const std::vector<CorpusLengths>& corpora = plan_->corpora();
    const bool matches = std::equal(
        corpora.begin(), corpora.end(), datasets_.begin(), datasets_.end(),
        [](const CorpusLengths& lengths, const std::shared_ptr<const IndexedDataset>& dataset) {
            return lengths.num_documents() == dataset->num_documents() &&
                   lengths.num_tokens() == dataset->num_tokens();
        });
    if (!matches) {
        throw std::invalid_argument("the row plan was not made from these datasets");
    }
}

std::uint64_t BatchAssembler::fill(const BatchArrays& batch) const {
    Scratch scratch;
    std::uint64_t batch_hash = 0;
    for (std::size_t index = 0; index < batch.rows.size(); ++index) {
        const std::int64_t row = batch.rows[index];
        const std::span tokens(batch.tokens + index * batch.seq_length, batch.seq_length);
        const std::span positions(batch.positions + index * batch.seq_length, batch.seq_length);
        const std::size_t first_slot = index * batch.masked_slots;
        const MaskedSlots slots{batch.masked + first_slot, batch.labels + first_slot,
                                batch.weights + first_slot, batch.masked_slots};
        write_row(row, tokens, positions, scratch);
        const auto key = random_key(seed_, Purpose::masking, row);
        masker_.mask(tokens, key, slots, scratch.masking);
        if (row != surplus_row) {
            std::uint64_t hash = hash_array(tokens, 0);
            hash = hash_array(positions, hash);
            hash = hash_array({slots.positions, slots.size}, hash);
            batch_hash += hash_array({slots.labels, slots.size}, hash);
        }
    }
    return batch_hash;
}

void BatchAssembler::write_row(std::int64_t row, std::span<std::int32_t> tokens,
                               std::span<std::int32_t> positions, Scratch& scratch) const {
    scratch.segments.clear();
    if (row != surplus_row) {
        check_row_length(row, tokens.size());
        plan_->segments(row, scratch.segments);
    }
    std::size_t begin = 0;
    for (const Segment& segment : scratch.segments) {
        const auto length = static_cast<std::size_t>(segment.span.length);
        const std::span text = tokens.subspan(begin + 1, length);
        tokens[begin] = masker_.vocabulary().cls;
        datasets_[segment.corpus]->copy_tokens(segment.span.document, segment.span.offset,
                                               segment.span.length, text.data());
        check_tokens(segment, text);
        tokens[begin + 1 + length] = masker_.vocabulary().sep;
        count_positions(positions.subspan(begin, length + 2));
        begin += length + 2;
    }
    std::ranges::fill(tokens.subspan(begin), masker_.vocabulary().pad);
    count_positions(positions.subspan(begin));
}

void BatchAssembler::check_row_length(std::int64_t row, std::size_t seq_length) const {
    const std::int64_t planned = plan_->stages()[plan_->stage_of(row).stage].seq_length;
    if (planned != static_cast<std::int64_t>(seq_length)) {
        throw std::invalid_argument("row " + std::to_string(row) + " has " +
                                    std::to_string(planned) + " slots, the batch's rows have " +
                                    std::to_string(seq_length));
    }
}

void BatchAssembler::check_tokens(const Segment& segment,
                                  std::span<const std::int32_t> tokens) const {
    // As unsigned numbers, so that a negative id is too large as well.
    std::uint32_t largest = 0;
    for (const std::int32_t token : tokens) {
        largest = std::max(largest, static_cast<std::uint32_t>(token));
    }
    const auto size = static_cast<std::uint32_t>(masker_.vocabulary().size);
    if (largest >= size) {
        throw std::runtime_error(datasets_[segment.corpus]->prefix() + ".bin: document " +
                                 std::to_string(segment.span.document) + " holds the token id " +
                                 std::to_string(static_cast<std::int32_t>(largest)) +
                                 ", but the vocabulary has " + std::to_string(size) + " ids");
    }
}

}  // namespace megatron_bert
