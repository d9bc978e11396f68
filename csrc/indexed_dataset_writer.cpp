#include "indexed_dataset_writer.h"

#include <algorithm>
#include <cerrno>
#include <limits>
#include <stdexcept>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <unistd.h>

namespace megatron_bert {

namespace {

constexpr std::size_t buffer_capacity = std::size_t{1} << 20;

/// A rename is durable only once the folder itself is on the disk.
void sync_folder_of(const std::string& path) {
    const std::size_t slash = path.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
    const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor >= 0) {
        // Some network filesystems cannot sync a folder; the rename itself has succeeded.
        static_cast<void>(::fsync(descriptor));
        ::close(descriptor);
    }
}

}  // namespace

AtomicFile::AtomicFile(std::string path)
    : path_(std::move(path)), temporary_path_(path_ + "." + std::to_string(::getpid()) + ".tmp") {
    descriptor_ = ::open(temporary_path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (descriptor_ < 0) {
        fail("cannot create");
    }
    buffer_.reserve(buffer_capacity);
}

AtomicFile::~AtomicFile() {
    if (descriptor_ >= 0) {
        ::close(descriptor_);
        ::unlink(temporary_path_.c_str());
    }
}

void AtomicFile::fail(const std::string& action) const {
    throw std::system_error(errno, std::generic_category(), action + " " + path_);
}

void AtomicFile::append(const void* data, std::size_t size) {
    const auto* bytes = static_cast<const std::byte*>(data);
    while (size > 0) {
        const std::size_t count = std::min(size, buffer_capacity - buffer_.size());
        buffer_.insert(buffer_.end(), bytes, bytes + count);
        bytes += count;
        size -= count;
        if (buffer_.size() == buffer_capacity) {
            flush();
        }
    }
}

void AtomicFile::flush() {
    std::size_t written = 0;
    while (written < buffer_.size()) {
        const ::ssize_t count =
            ::write(descriptor_, buffer_.data() + written, buffer_.size() - written);
        if (count < 0) {
            if (errno == EINTR) {
                continue;
            }
            fail("cannot write");
        }
        written += static_cast<std::size_t>(count);
    }
    buffer_.clear();
}

void AtomicFile::sync() {
    flush();
    if (::fsync(descriptor_) != 0) {
        fail("cannot write");
    }
}

void AtomicFile::commit() {
    if (::rename(temporary_path_.c_str(), path_.c_str()) != 0) {
        fail("cannot rename to");
    }
    ::close(std::exchange(descriptor_, -1));
    sync_folder_of(path_);
}

IndexedDatasetWriter::IndexedDatasetWriter(std::string prefix, TokenType token_type)
    : prefix_(std::move(prefix)),
      token_type_(token_type),
      tokens_(prefix_ + ".bin"),
      index_(prefix_ + ".idx") {}

void IndexedDatasetWriter::check_open() const {
    if (state_ != State::open) {
        throw std::invalid_argument(prefix_ + ": the dataset is closed");
    }
}

void IndexedDatasetWriter::add_document(std::span<const std::int32_t> tokens) {
    check_open();
    if (tokens.size() > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
        throw std::invalid_argument("a document of " + std::to_string(tokens.size()) +
                                    " tokens is longer than the format can say");
    }
    const std::int32_t largest_id = token_type_ == TokenType::uint16
                                        ? std::numeric_limits<std::uint16_t>::max()
                                        : std::numeric_limits<std::int32_t>::max();
    for (const std::int32_t token : tokens) {
        if (token < 0 || token > largest_id) {
            throw std::invalid_argument("token id " + std::to_string(token) +
                                        " is not between 0 and " + std::to_string(largest_id));
        }
    }
    if (token_type_ == TokenType::int32) {
        tokens_.append(tokens.data(), tokens.size_bytes());
    } else {
        const std::vector<std::uint16_t> narrow(tokens.begin(), tokens.end());
        tokens_.append(narrow.data(), narrow.size() * sizeof(std::uint16_t));
    }
    lengths_.push_back(static_cast<std::int32_t>(tokens.size()));
}

void IndexedDatasetWriter::add_documents(std::span<const std::int32_t> tokens,
                                         std::span<const std::int64_t> lengths) {
    std::size_t total = 0;
    for (const std::int64_t length : lengths) {
        if (length < 0 || static_cast<std::size_t>(length) > tokens.size() - total) {
            throw std::invalid_argument("document lengths do not fit the " +
                                        std::to_string(tokens.size()) + " tokens given");
        }
        total += static_cast<std::size_t>(length);
    }
    if (total != tokens.size()) {
        throw std::invalid_argument("document lengths sum to " + std::to_string(total) + ", but " +
                                    std::to_string(tokens.size()) + " tokens are given");
    }
    for (const std::int64_t length : lengths) {
        const auto count = static_cast<std::size_t>(length);
        add_document(tokens.first(count));
        tokens = tokens.subspan(count);
    }
}

void IndexedDatasetWriter::finish() {
    check_open();
    state_ = State::closed;  // And so it stays where the disk fails: half of it never gets its name.
    write_index();
    tokens_.sync();
    index_.sync();
    state_ = State::finished;
}

void IndexedDatasetWriter::close() {
    if (state_ != State::finished) {
        finish();
    }
    state_ = State::closed;
    // An older index beside newer tokens would be a damaged dataset; none at all is a missing one.
    if (::unlink((prefix_ + ".idx").c_str()) != 0 && errno != ENOENT) {
        throw std::system_error(errno, std::generic_category(), "cannot replace " + prefix_ + ".idx");
    }
    tokens_.commit();
    index_.commit();
}

void IndexedDatasetWriter::write_index() {
    const auto append = [this](auto value) { index_.append(&value, sizeof(value)); };
    const auto num_sequences = static_cast<std::uint64_t>(lengths_.size());
    index_.append(index_format::magic, sizeof(index_format::magic));
    append(index_format::version);
    append(static_cast<std::uint8_t>(token_type_));
    append(num_sequences);
    append(num_sequences + 1);
    index_.append(lengths_.data(), lengths_.size() * sizeof(std::int32_t));
    const std::int64_t token_size = token_type_ == TokenType::int32 ? 4 : 2;
    std::int64_t offset = 0;
    for (const std::int32_t length : lengths_) {
        append(offset);
        offset += length * token_size;
    }
    for (std::uint64_t boundary = 0; boundary <= num_sequences; ++boundary) {
        append(static_cast<std::int64_t>(boundary));
    }
}

}  // namespace megatron_bert
