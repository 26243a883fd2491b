//! Names of images, points, chains and snapshots, and the file names made of them. Pure.
//!
//! Everything here is parsed strictly: a text is accepted only when it is exactly what the program
//! would have written itself. So a name has one spelling, and two names never share one.

use std::fmt;

/// Longest name of a file or directory, in bytes: NAME_MAX of every file system in use.
const FILE_NAME_MAX: usize = 255;

/// What a chain puts around the encoded image name in its longest file name.
const LONGEST_AFFIXES: usize = ".@20261122T173312Z.digests.partial".len();

/// Longest encoded image name, in bytes.
const ENCODED_MAX: usize = FILE_NAME_MAX - LONGEST_AFFIXES;

/// Behind the name of a file that is still being written.
const PARTIAL_SUFFIX: &str = ".partial";

/// Ends the names of files that are to replace others.
const MERGED_SUFFIX: &str = ".merged";

/// What the name of a file ends with that has outlived its point.
const BASE_SUFFIX: &str = ".base";

/// Why something is not a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// An image without a name.
    #[error("the name of the image is empty")]
    EmptyImage,
    /// RBD names are C strings: no image has such a name.
    #[error("the name of the image, {image:?}, holds a NUL character")]
    NulInImage {
        /// The name.
        image: String,
    },
    /// The bytes of an image's name are not UTF-8.
    #[error("the name of the image, {lossy:?}, is not valid UTF-8 (rename it with `rbd rename`)")]
    NotUtf8 {
        /// The name, with replacement characters.
        lossy: String,
    },
    /// The files of the image would have names that no file system takes.
    #[error(
        "the name of the image, {image:?}, takes {encoded} bytes in a file name (at most {ENCODED_MAX} fit; \
         bytes outside A-Z a-z 0-9 . _ - take three each): rename the image with `rbd rename`"
    )]
    ImageTooLong {
        /// The name.
        image: String,
        /// Length of the encoded name, in bytes.
        encoded: usize,
    },
    /// A file name that is not the encoding of any image's name.
    #[error("{text:?} is not the encoded name of an image")]
    NotAnImage {
        /// What was found.
        text: String,
    },
    /// A text that names no point.
    #[error("{text:?} names no point (YYYYMMDDTHHMMSSZ, or a unix time for points of the Python tool)")]
    NotAPoint {
        /// What was found.
        text: String,
    },
    /// A time before 1970 or at the end of the year 9999.
    #[error("unix time {seconds} cannot name a point (is the clock right?)")]
    TimeOutOfRange {
        /// Seconds since 1970.
        seconds: i64,
    },
    /// A text that is no chain id.
    #[error("{text:?} is not a chain id (8 lower-case hex digits)")]
    NotAChainId {
        /// What was found.
        text: String,
    },
    /// A snapshot that is not one of this program.
    #[error("{text:?} is not a snapshot of rbd2qcow2")]
    NotASnapshot {
        /// What was found.
        text: String,
    },
}

/// The name of an RBD image, known to be usable: not empty, no NUL, and short enough for all the
/// names of its files.
///
/// Its [`Display`](fmt::Display) is the name as Ceph knows it, for people. For paths there is only
/// [`encoded`](Self::encoded).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageName(String);

impl ImageName {
    /// Takes the name as Ceph knows it.
    ///
    /// # Errors
    /// [`NameError::EmptyImage`], [`NameError::NulInImage`], [`NameError::ImageTooLong`].
    pub fn new(image: impl Into<String>) -> Result<Self, NameError> {
        let name = Self(image.into());
        if name.0.is_empty() {
            return Err(NameError::EmptyImage);
        }
        if name.0.contains('\0') {
            return Err(NameError::NulInImage { image: name.0 });
        }
        let encoded = name.encoded().len();
        if encoded > ENCODED_MAX {
            return Err(NameError::ImageTooLong { image: name.0, encoded });
        }
        Ok(name)
    }

    /// Takes the bytes that Ceph keeps.
    ///
    /// # Errors
    /// [`NameError::NotUtf8`], and those of [`new`](Self::new).
    pub fn from_bytes(image: &[u8]) -> Result<Self, NameError> {
        match std::str::from_utf8(image) {
            Ok(text) => Self::new(text),
            Err(_) => Err(NameError::NotUtf8 { lossy: String::from_utf8_lossy(image).into_owned() }),
        }
    }

    /// The name as Ceph knows it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name in file names: bytes outside `[A-Za-z0-9._-]`, and a leading dot, are `%` and two
    /// upper-case hex digits. Holds no `/` and does not begin with a dot, so it cannot lead out of a
    /// directory and never meets the program's own dot files.
    #[must_use]
    pub fn encoded(&self) -> String {
        use fmt::Write;
        let mut encoded = String::with_capacity(self.0.len());
        for (index, byte) in self.0.bytes().enumerate() {
            match byte {
                b'.' if index == 0 => encoded.push_str("%2E"),
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-' => encoded.push(byte.into()),
                // Writing to a String cannot fail.
                _ => _ = write!(encoded, "%{byte:02X}"),
            }
        }
        encoded
    }

    /// The image whose [`encoded`](Self::encoded) name `text` is.
    ///
    /// # Errors
    /// [`NameError::NotAnImage`] for everything that `encoded` would not have written, as `%41` for
    /// `A` or `%2e` for a dot.
    pub fn decode(text: &str) -> Result<Self, NameError> {
        let not_an_image = || NameError::NotAnImage { text: text.to_owned() };
        let mut bytes = Vec::with_capacity(text.len());
        let mut rest = text.bytes();
        while let Some(byte) = rest.next() {
            if byte == b'%' {
                let high = rest.next().and_then(hex_digit).ok_or_else(not_an_image)?;
                let low = rest.next().and_then(hex_digit).ok_or_else(not_an_image)?;
                bytes.push(high << 4 | low);
            } else {
                bytes.push(byte);
            }
        }
        let name = Self::from_bytes(&bytes).map_err(|_| not_an_image())?;
        // One comparison rejects every spelling but the canonical one.
        if name.encoded() == text { Ok(name) } else { Err(not_an_image()) }
    }
}

fn hex_digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How the time of a point is spelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Spelling {
    /// Decimal unix time: a point of the Python tool. Sorts before ours of the same second, since
    /// that tool's chain is the one that is continued.
    Unix,
    /// `YYYYMMDDTHHMMSSZ`: a point of this program.
    Utc,
}

/// The name of a point: the second at which it was taken. Ordered by time.
///
/// Shown as `YYYYMMDDTHHMMSSZ`, or as decimal unix time for a point of the Python rbd2qcow2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PointName {
    /// Since 1970, from 0 to [`PointName::LAST_SECOND`].
    seconds: i64,
    spelling: Spelling,
}

impl PointName {
    /// 9999-12-30T22:00:00Z: the last second that [`jiff::Timestamp`] can tell.
    const LAST_SECOND: i64 = 253_402_207_200;

    /// The name of a point of this program taken at `time`; fractions of a second are dropped.
    ///
    /// # Errors
    /// [`NameError::TimeOutOfRange`] before 1970.
    pub fn at(time: jiff::Timestamp) -> Result<Self, NameError> {
        Self::from_unix(time.as_second(), Spelling::Utc)
    }

    fn from_unix(seconds: i64, spelling: Spelling) -> Result<Self, NameError> {
        if !(0..=Self::LAST_SECOND).contains(&seconds) {
            return Err(NameError::TimeOutOfRange { seconds });
        }
        Ok(Self { seconds, spelling })
    }

    /// The name of the point to take `now`, when the newest so far is `last`. The flag tells that
    /// the clock stands at or before `last` (it was set back, or two runs began within a second):
    /// the name is then one second after `last`.
    ///
    /// # Errors
    /// [`NameError::TimeOutOfRange`] when that leaves the range of times.
    pub fn next_after(last: Option<Self>, now: jiff::Timestamp) -> Result<(Self, bool), NameError> {
        match last {
            Some(last) if now.as_second() <= last.seconds => {
                Ok((Self::from_unix(last.seconds + 1, Spelling::Utc)?, true))
            }
            _ => Ok((Self::at(now)?, false)),
        }
    }

    /// The point that `text` names, in either spelling.
    ///
    /// # Errors
    /// [`NameError::NotAPoint`] for everything that [`Display`](fmt::Display) would not have
    /// written.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let parsed = if text.ends_with('Z') { Self::parse_utc(text) } else { Self::parse_unix(text) };
        // One comparison rejects leading zeroes, signs, and dates that a lenient parser moves.
        match parsed {
            Some(point) if point.to_string() == text => Ok(point),
            _ => Err(NameError::NotAPoint { text: text.to_owned() }),
        }
    }

    fn parse_utc(text: &str) -> Option<Self> {
        // Every number has a fixed width, so slices suffice.
        let number = |range: std::ops::Range<usize>| text.get(range)?.parse::<i8>().ok();
        let year: i16 = text.get(0..4)?.parse().ok()?;
        let date = jiff::civil::Date::new(year, number(4..6)?, number(6..8)?).ok()?;
        let time = jiff::civil::Time::new(number(9..11)?, number(11..13)?, number(13..15)?, 0).ok()?;
        let timestamp = jiff::tz::TimeZone::UTC.to_timestamp(date.to_datetime(time)).ok()?;
        Self::at(timestamp).ok()
    }

    fn parse_unix(text: &str) -> Option<Self> {
        Self::from_unix(text.parse().ok()?, Spelling::Unix).ok()
    }

    /// When the point was taken.
    #[must_use]
    pub fn timestamp(self) -> jiff::Timestamp {
        // The range was checked when the name was made.
        jiff::Timestamp::from_second(self.seconds).unwrap_or(jiff::Timestamp::UNIX_EPOCH)
    }

    /// Whether the Python rbd2qcow2 made the point. Its RBD snapshot is then named as the point.
    #[must_use]
    pub fn is_python(self) -> bool {
        self.spelling == Spelling::Unix
    }
}

impl fmt::Display for PointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_python() {
            return write!(f, "{}", self.seconds);
        }
        let utc = jiff::tz::TimeZone::UTC.to_datetime(self.timestamp());
        write!(f, "{:04}{:02}{:02}", utc.year(), utc.month(), utc.day())?;
        write!(f, "T{:02}{:02}{:02}Z", utc.hour(), utc.minute(), utc.second())
    }
}

/// What distinguishes the snapshots of one chain from those of every other: 8 hex digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChainId([u8; 4]);

impl ChainId {
    /// Draws a new one from the kernel's random numbers.
    ///
    /// # Errors
    /// What `getrandom(2)` says.
    pub fn draw() -> std::io::Result<Self> {
        let mut bytes = [0; 4];
        // Requests of up to 256 bytes are never cut short.
        rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
        Ok(Self(bytes))
    }

    /// The id that `text` spells.
    ///
    /// # Errors
    /// [`NameError::NotAChainId`] unless it is 8 lower-case hex digits.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        match u32::from_str_radix(text, 16).map(|number| Self(number.to_be_bytes())) {
            Ok(id) if id.to_string() == text => Ok(id),
            _ => Err(NameError::NotAChainId { text: text.to_owned() }),
        }
    }
}

impl fmt::Display for ChainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", u32::from_be_bytes(self.0))
    }
}

/// The RBD snapshot of a point: `rbd2qcow2-<chain id>-<point>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SnapshotName {
    /// Whose snapshot it is. Nobody else may delete it.
    pub chain: ChainId,
    /// The point that was, or was to be, taken from it.
    pub point: PointName,
}

impl SnapshotName {
    /// The chain and point that `text` names.
    ///
    /// # Errors
    /// [`NameError::NotASnapshot`] for everything that [`Display`](fmt::Display) would not have
    /// written. Snapshots of the Python tool are not of this form.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let parsed = text.strip_prefix("rbd2qcow2-").and_then(|rest| rest.split_once('-'));
        let parts = parsed.and_then(|(chain, point)| {
            Some(Self { chain: ChainId::parse(chain).ok()?, point: PointName::parse(point).ok()? })
        });
        match parts {
            Some(name) if !name.point.is_python() => Ok(name),
            _ => Err(NameError::NotASnapshot { text: text.to_owned() }),
        }
    }
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rbd2qcow2-{}-{}", self.chain, self.point)
    }
}

/// The three files of a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FileKind {
    /// The qcow2 file.
    Layer,
    /// The manifest.
    Manifest,
    /// The digests of what the layer holds.
    Digests,
}

impl FileKind {
    const ALL: [Self; 3] = [Self::Layer, Self::Manifest, Self::Digests];

    /// What the names of such files end with.
    #[must_use]
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Layer => ".qcow2",
            Self::Manifest => ".json",
            Self::Digests => ".digests",
        }
    }
}

/// A file of a point of an image, by its name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PointFile {
    /// The image.
    pub image: ImageName,
    /// The point.
    pub point: PointName,
    /// Which of the point's files.
    pub kind: FileKind,
}

impl PointFile {
    /// Its name in the directory of the image: `<image>@<point><suffix>`.
    #[must_use]
    pub fn file_name(&self) -> String {
        format!("{}@{}{}", self.image.encoded(), self.point, self.kind.suffix())
    }

    /// Its name while it is being written: `.<image>@<point><suffix>.partial`.
    #[must_use]
    pub fn partial_name(&self) -> String {
        format!(".{}{PARTIAL_SUFFIX}", self.file_name())
    }

    /// Its name while it waits to replace the file of that name: `.<image>@<point><suffix>.merged`.
    #[must_use]
    pub fn merged_name(&self) -> String {
        format!(".{}{MERGED_SUFFIX}", self.file_name())
    }

    /// Its name while the point is gone, but its layer is still what another point's builds upon:
    /// `.<image>@<point><suffix>.base`.
    #[must_use]
    pub fn base_name(&self) -> String {
        format!(".{}{BASE_SUFFIX}", self.file_name())
    }

    /// The file whose [`base_name`](Self::base_name) `name` is, if it is one.
    #[must_use]
    pub fn parse_base(name: &str) -> Option<Self> {
        Self::parse(name.strip_prefix('.')?.strip_suffix(BASE_SUFFIX)?)
    }

    /// The file whose [`merged_name`](Self::merged_name) `name` is, if it is one.
    #[must_use]
    pub fn parse_merged(name: &str) -> Option<Self> {
        Self::parse(name.strip_prefix('.')?.strip_suffix(MERGED_SUFFIX)?)
    }

    /// The file whose [`file_name`](Self::file_name) `name` is, if it is one.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let kind = FileKind::ALL.into_iter().find(|kind| name.ends_with(kind.suffix()))?;
        let (image, point) = name.strip_suffix(kind.suffix())?.split_once('@')?;
        Some(Self { image: ImageName::decode(image).ok()?, point: PointName::parse(point).ok()?, kind })
    }

    /// The file whose [`partial_name`](Self::partial_name) `name` is, if it is one.
    #[must_use]
    pub fn parse_partial(name: &str) -> Option<Self> {
        Self::parse(name.strip_prefix('.')?.strip_suffix(PARTIAL_SUFFIX)?)
    }
}

#[cfg(test)]
mod tests;
