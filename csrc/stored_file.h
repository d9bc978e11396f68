// A file opened for reading, and how its bytes are got.
#pragma once

#include <cstddef>
#include <cstdint>
#include <ctime>
#include <memory>
#include <span>
#include <string>

#include <sys/stat.h>

namespace megatron_bert {

/// How a file's bytes are got: by memory map where the system grants one, or always by pread.
enum class FileAccess { map, read };

/// A file of bytes that are not to change while it is open.
///
/// A mapped file costs nothing per read and no descriptor. Some filesystems and limits refuse maps
/// (ENODEV, ENOMEM, EACCES, ...); then, as with FileAccess::read, the descriptor is kept and bytes
/// are read on demand. Const methods are thread-safe.
class StoredFile {
  public:
    /// Throws std::system_error, naming the file, when it cannot be opened.
    StoredFile(std::string path, FileAccess access);
    ~StoredFile();

    StoredFile(const StoredFile&) = delete;
    StoredFile& operator=(const StoredFile&) = delete;

    const std::string& path() const noexcept { return path_; }
    std::size_t size() const noexcept { return static_cast<std::size_t>(state_.size); }

    /// The first byte; nullptr for a file that is not mapped, and for an empty one.
    const std::byte* mapped() const noexcept { return mapped_; }

    /// Whether reads need no system call. (An empty file has nothing to map or to read.)
    bool is_mapped() const noexcept { return mapped_ != nullptr || size() == 0; }

    /// Reads bytes of a file that is not mapped.
    /// Throws std::system_error, naming the file and the offset, when they cannot be read, and
    /// std::runtime_error when the file ends before them.
    void read(std::size_t offset, std::span<std::byte> bytes) const;

    /// All bytes: the map, or, without one, a copy that the object keeps.
    /// Throws as `read`, and std::runtime_error when memory cannot hold the copy. Not thread-safe.
    std::span<const std::byte> whole();

    /// Has a mapped file's pages read one by one, without the pages around them.
    void expect_random_reads() const noexcept;

    /// Throws std::runtime_error, saying what happened, unless the path still names this file with
    /// the size and modification time that it had when it was opened.
    ///
    /// One system call. It finds changes after the fact: a truncated map raises SIGBUS when it is
    /// read beyond the end before the next check.
    void check_unchanged() const;

  private:
    struct State {
        ::dev_t device = 0;
        ::ino_t inode = 0;
        std::int64_t size = 0;
        std::time_t modified_seconds = 0;
        long modified_nanoseconds = 0;

        friend bool operator==(const State&, const State&) = default;
    };

    static State state_of(const struct ::stat& status) noexcept;
    [[noreturn]] void fail(int error, const std::string& what) const;

    std::string path_;
    std::string absolute_path_;  ///< the working directory may change
    State state_;
    int descriptor_ = -1;  ///< kept only where the file is not mapped
    const std::byte* mapped_ = nullptr;
    std::unique_ptr<std::byte[]> copy_;
};

}  // namespace megatron_bert
