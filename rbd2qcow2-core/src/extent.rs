//! Ranges of an image that hold data or zeroes, and their alignment to a layer's grain. Pure.

/// What is known of an extent's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExtentKind {
    /// Must be read to be known.
    Data,
    /// Zeroes.
    Zero,
}

/// A range of an image, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte, counted from the image's start.
    pub offset: u64,
    /// Number of bytes, not 0.
    pub length: u64,
    /// What is known of the bytes.
    pub kind: ExtentKind,
}

impl Extent {
    /// First byte behind the extent.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }
}
