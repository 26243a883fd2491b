//! Byte strings as a manifest tells them.

use std::collections::BTreeMap;

use super::{ManifestError, wrong};

/// Marks a metadata key or value that is given in hex.
pub(super) const HEX_PREFIX: &str = "hex:";

/// Stores a byte string in JSON, see the documentation of manifests.
pub(super) fn to_text(bytes: &[u8]) -> String {
    use std::fmt::Write;
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.starts_with(HEX_PREFIX) => text.to_owned(),
        _ => bytes.iter().fold(HEX_PREFIX.to_owned(), |mut text, byte| {
            // Writing to a String cannot fail.
            _ = write!(text, "{byte:02x}");
            text
        }),
    }
}

/// The byte string that [`to_text`] stores as `text`.
pub(super) fn from_text(text: &str) -> Option<Vec<u8>> {
    let Some(hex) = text.strip_prefix(HEX_PREFIX) else {
        return Some(text.as_bytes().to_owned());
    };
    let pairs = hex.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).ok());
    let bytes: Option<Vec<u8>> = pairs.map(|pair| u8::from_str_radix(pair?, 16).ok()).collect();
    // Rejects odd lengths, signs, upper case, and hex where plain text would do.
    bytes.filter(|bytes| to_text(bytes) == text)
}

/// The image's metadata, from what the file says.
///
/// # Errors
/// [`ManifestError::Value`].
pub(super) fn metadata(raw: &BTreeMap<String, String>) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, ManifestError> {
    let decode = |text: &String| from_text(text).ok_or_else(|| wrong("metadata", text, "text or hex:…"));
    raw.iter().map(|(key, value)| Ok((decode(key)?, decode(value)?))).collect()
}
