#include "row_plan.h"

#include <algorithm>
#include <atomic>
#include <future>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

namespace megatron_bert {

namespace {

std::uint64_t document_order_key(std::uint64_t seed, std::size_t corpus, std::int64_t epoch) {
    return random_key(seed, Purpose::document_order, corpus, epoch);
}

/// Appends a span, or extends the last one if the span continues it.
void append_merged(std::vector<Span>& spans, const Span& span) {
    if (!spans.empty() && spans.back().document == span.document &&
        spans.back().offset + spans.back().length == span.offset) {
        spans.back().length += span.length;
    } else {
        spans.push_back(span);
    }
}

}  // namespace

CorpusStage::CorpusStage(const CorpusLengths& lengths, Id id, Stage stage, StreamStart start)
    : lengths_(&lengths),
      id_(id),
      stage_(stage),
      start_(std::move(start)),
      first_epoch_(start_.carried.empty() ? start_.epoch : start_.carried_epoch) {
    if (stage_.rows > 0) {
        cut_windows();
    }
}

void CorpusStage::cut_windows() {
    anchors_.reserve(static_cast<std::size_t>((stage_.rows + window_rows) / anchor_rows + 1));
    add_epoch();
    RowCutter rows = cutter(0, {});
    while (num_rows_cut_ < stage_.rows) {
        if (rows.at_end()) {
            add_epoch();
            rows = cutter(epochs_.size() - 1, {});
            continue;
        }
        windows_.push_back({num_rows_cut_, epochs_.size() - 1, anchors_.size()});
        for (std::int64_t row = 0; row < window_rows && !rows.at_end(); ++row) {
            if (row % anchor_rows == 0) {
                anchors_.push_back(rows.place());
            }
            rows.cut_row(stage_.seq_length,
                         [this](const Span& span) { tokens_read_ += span.length; });
            ++num_rows_cut_;
        }
    }
    // So far all cut tokens are counted; subtract those that are not read.
    const std::vector<bool> unread = unread_rows_of_last_window();
    rows = cutter(windows_.back().epoch, anchors_[windows_.back().first_anchor]);
    for (const bool is_unread : unread) {
        rows.cut_row(stage_.seq_length, [&](const Span& span) {
            tokens_read_ -= is_unread ? span.length : 0;
        });
    }
}

void CorpusStage::add_epoch() {
    const std::int64_t epoch = first_epoch_ + static_cast<std::int64_t>(epochs_.size());
    epochs_.emplace_back(*lengths_, start_, epoch, document_order_key(id_.seed, id_.corpus, epoch));
}

RowCutter CorpusStage::cutter(std::size_t epoch, RowCutter::Place place) const noexcept {
    return {epochs_[epoch], place};
}

std::int64_t CorpusStage::window_size(std::size_t window) const noexcept {
    const std::int64_t end =
        window + 1 < windows_.size() ? windows_[window + 1].first_row : num_rows_cut_;
    return end - windows_[window].first_row;
}

Permutation CorpusStage::row_order(std::size_t window) const noexcept {
    return {static_cast<std::uint64_t>(window_size(window)),
            random_key(id_.seed, Purpose::row_order, id_.corpus, id_.stage, window)};
}

void CorpusStage::append_segments(std::int64_t row, std::vector<Segment>& segments) const {
    // No window is longer than window_rows, so the row's window is not before this one.
    const auto earliest = windows_.begin() + row / window_rows;
    const auto next = std::upper_bound(
        earliest, windows_.end(), row,
        [](std::int64_t number, const Window& window) { return number < window.first_row; });
    const auto number = static_cast<std::size_t>(next - windows_.begin()) - 1;
    const Window& window = windows_[number];
    const auto cut_row = static_cast<std::int64_t>(
        row_order(number)(static_cast<std::uint64_t>(row - window.first_row)));

    const std::size_t anchor = window.first_anchor + static_cast<std::size_t>(cut_row / anchor_rows);
    RowCutter rows = cutter(window.epoch, anchors_[anchor]);
    for (std::int64_t skipped = 0; skipped < cut_row % anchor_rows; ++skipped) {
        rows.cut_row(stage_.seq_length, [](const Span&) {});
    }
    rows.cut_row(stage_.seq_length,
                 [&](const Span& span) {
                     segments.push_back({id_.corpus, span});
                     segments.back().span.document = lengths_->number_of(span.document);
                 });
}

std::vector<bool> CorpusStage::unread_rows_of_last_window() const {
    const std::size_t last = windows_.size() - 1;
    const Permutation order = row_order(last);
    std::vector<bool> unread(order.size(), false);
    const auto num_read = static_cast<std::uint64_t>(stage_.rows - windows_[last].first_row);
    for (std::uint64_t row = num_read; row < order.size(); ++row) {
        unread[order(row)] = true;
    }
    return unread;
}

StreamStart CorpusStage::next_start() const {
    if (windows_.empty()) {
        return start_;
    }
    const Window& window = windows_.back();
    StreamStart next;
    next.carried_epoch = first_epoch_ + static_cast<std::int64_t>(window.epoch);
    RowCutter rows = cutter(window.epoch, anchors_[window.first_anchor]);
    for (const bool is_unread : unread_rows_of_last_window()) {
        rows.cut_row(stage_.seq_length, [&](const Span& span) {
            if (is_unread) {
                append_merged(next.carried, span);
            }
        });
    }
    // Spans carried into this stage that it did not reach, and the rest of a document it began.
    while (!rows.at_end() &&
           (rows.place().piece < rows.pieces().num_carried() || rows.place().offset > 0)) {
        append_merged(next.carried, rows.rest_of_piece());
        rows.skip_piece();
    }
    if (rows.at_end()) {
        next.epoch = next.carried_epoch + 1;
        next.position = 0;
    } else {
        next.epoch = next.carried_epoch;
        next.position = rows.pieces().position_of(rows.place().piece);
    }
    return next;
}

RowPlan::RowPlan(std::vector<CorpusLengths> corpora, std::vector<double> weights,
                 std::vector<Stage> stages, std::uint64_t seed)
    : corpora_(std::move(corpora)), weights_(std::move(weights)), stages_(std::move(stages)) {
    check();
    first_rows_.push_back(0);
    for (const Stage& stage : stages_) {
        blends_.emplace_back(weights_, stage.rows);
        first_rows_.push_back(first_rows_.back() + stage.rows);
    }
    plan_corpora(seed);
}

void RowPlan::plan_corpora(std::uint64_t seed) {
    corpus_stages_.resize(corpora_.size());
    std::atomic<std::size_t> next{0};
    const auto plan_some = [&] {
        for (std::size_t corpus = next++; corpus < corpora_.size(); corpus = next++) {
            corpus_stages_[corpus] = plan_corpus(corpus, seed);
        }
    };
    const std::size_t num_cores = std::max(1U, std::thread::hardware_concurrency());
    std::vector<std::future<void>> workers;
    for (std::size_t worker = 0; worker < std::min(num_cores, corpora_.size()); ++worker) {
        workers.push_back(std::async(std::launch::async, plan_some));
    }
    for (auto& worker : workers) {
        worker.get();
    }
}

void RowPlan::check() const {
    if (corpora_.empty() || corpora_.size() != weights_.size()) {
        throw std::invalid_argument("expected a weight for each corpus and at least one, got " +
                                    std::to_string(corpora_.size()) + " corpora and " +
                                    std::to_string(weights_.size()) + " weights");
    }
    for (std::size_t corpus = 0; corpus < corpora_.size(); ++corpus) {
        if (corpora_[corpus].num_tokens() == 0) {
            throw std::invalid_argument("corpus " + std::to_string(corpus) + " holds no token");
        }
    }
    for (const Stage& stage : stages_) {
        if (stage.seq_length < min_segment_slots || stage.rows < 0) {
            throw std::invalid_argument("a stage of " + std::to_string(stage.rows) + " rows of " +
                                        std::to_string(stage.seq_length) +
                                        " slots: rows need at least 3 slots");
        }
    }
}

std::vector<CorpusStage> RowPlan::plan_corpus(std::size_t corpus, std::uint64_t seed) const {
    std::vector<CorpusStage> planned;
    StreamStart start;
    for (std::size_t stage = 0; stage < stages_.size(); ++stage) {
        const Stage share{stages_[stage].seq_length, blends_[stage].totals()[corpus]};
        planned.emplace_back(corpora_[corpus], CorpusStage::Id{seed, corpus, stage}, share,
                             std::move(start));
        start = planned.back().next_start();
    }
    return planned;
}

RowPlan::StageRow RowPlan::stage_of(std::int64_t row) const {
    if (row < 0 || row >= num_rows()) {
        throw std::out_of_range("row " + std::to_string(row) + " of " + std::to_string(num_rows()));
    }
    const auto next = std::upper_bound(first_rows_.begin(), first_rows_.end(), row);
    const auto stage = static_cast<std::size_t>(next - first_rows_.begin()) - 1;
    return {stage, row - first_rows_[stage]};
}

void RowPlan::segments(std::int64_t row, std::vector<Segment>& segments) const {
    const StageRow place = stage_of(row);
    const Blend::Choice choice = blends_[place.stage](place.row);
    segments.clear();
    corpus_stages_[choice.corpus][place.stage].append_segments(choice.row, segments);
}

std::vector<double> RowPlan::epochs() const {
    std::vector<double> epochs;
    for (std::size_t corpus = 0; corpus < corpora_.size(); ++corpus) {
        double tokens = 0;
        for (const CorpusStage& stage : corpus_stages_[corpus]) {
            tokens += static_cast<double>(stage.tokens_read());
        }
        epochs.push_back(tokens / static_cast<double>(corpora_[corpus].num_tokens()));
    }
    return epochs;
}

std::int64_t epoch_rows(const CorpusLengths& lengths, std::int64_t seq_length, std::uint64_t seed,
                        std::size_t corpus, std::int64_t limit) {
    if (seq_length < min_segment_slots) {
        throw std::invalid_argument("rows need at least 3 slots, got " + std::to_string(seq_length));
    }
    RowCutter rows(EpochPieces(lengths, StreamStart{}, 0, document_order_key(seed, corpus, 0)), {});
    std::int64_t count = 0;
    for (; count < limit && !rows.at_end(); ++count) {
        rows.cut_row(seq_length, [](const Span&) {});
    }
    return count;
}

}  // namespace megatron_bert
