//! Values of options: from text to what they mean.

use std::fmt;
use std::str::FromStr;

use rbd2qcow2_core::chain::PointName;
use rbd2qcow2_core::layer::Compression;
use rbd2qcow2_core::prune::Limit;
use rbd2qcow2_core::rbd::Features;

/// Why a value is refused. Clap shows it behind the option and the value.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// Nothing where a name must be.
    #[error("must not be empty")]
    Empty,
    /// A pool that is neither `POOL` nor `POOL/NAMESPACE`.
    #[error("must be POOL or POOL/NAMESPACE")]
    Pool,
    /// An image that is neither `POOL/IMAGE` nor `POOL/NAMESPACE/IMAGE`, or a snapshot.
    #[error("must be POOL/IMAGE or POOL/NAMESPACE/IMAGE")]
    Image,
    /// A client's name without its type.
    #[error("must be TYPE.ID, `client.admin` for instance; for `--name client.ID` say `--id ID`")]
    Entity,
    /// Not a number of bytes.
    #[error("must be a whole number of bytes, with K, M, G or T for powers of 1024")]
    Bytes,
    /// More bytes than can be counted.
    #[error("is too large")]
    TooLarge,
    /// None where there must be some.
    #[error("must not be 0")]
    Zero,
    /// Not a cluster size that qcow2 has.
    #[error("must be a power of two from 512 to 2M")]
    ClusterSize,
    /// Not an object size that RBD has.
    #[error("must be a power of two from 4K to 32M")]
    ObjectSize,
    /// Not a feature that an image can be created with.
    #[error("is no feature of RBD images that can be chosen")]
    Feature,
    /// No key with a value.
    #[error("must be KEY=VALUE")]
    KeyValue,
    /// No share of anything.
    #[error("must be a number above 0, at most 100")]
    Percent,
    /// Not a compression.
    #[error("must be none, zlib, zstd or zstd:LEVEL")]
    Compression,
    /// Not a level of Zstandard.
    #[error("the level must be a number from 1 to 22")]
    Level,
    /// No number of points.
    #[error("must be a number, or `unlimited`")]
    Limit,
    /// An image where a single point is needed.
    #[error("must be IMAGE@POINT; `list` shows the points")]
    NoPoint,
}

/// `POOL[/NAMESPACE]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolSpec {
    /// The pool's name, not empty.
    pub pool: String,
    /// The namespace within the pool; empty for the default one.
    pub namespace: String,
}

impl FromStr for PoolSpec {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let (pool, namespace) = match text.split_once('/') {
            None => (text, ""),
            // `rbd` has no way either to name a pool or a namespace with a slash in it.
            Some((_, namespace)) if namespace.is_empty() || namespace.contains('/') => {
                return Err(ValueError::Pool);
            }
            Some(both) => both,
        };
        if pool.is_empty() {
            return Err(ValueError::Pool);
        }
        Ok(Self { pool: pool.to_owned(), namespace: namespace.to_owned() })
    }
}

/// `POOL[/NAMESPACE]/IMAGE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSpec {
    /// Where the image is.
    pub pool: PoolSpec,
    /// Its name, not empty.
    pub image: String,
}

impl FromStr for ImageSpec {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let (pool, image) = text.rsplit_once('/').ok_or(ValueError::Image)?;
        if image.is_empty() || image.contains('@') {
            return Err(ValueError::Image);
        }
        let pool = pool.parse().map_err(|_| ValueError::Image)?;
        Ok(Self { pool, image: image.to_owned() })
    }
}

impl fmt::Display for ImageSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pool: PoolSpec { pool, namespace }, image } = self;
        if namespace.is_empty() {
            write!(f, "{pool}/{image}")
        } else {
            write!(f, "{pool}/{namespace}/{image}")
        }
    }
}

/// `IMAGE[@POINT]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PointSpec {
    /// The image's name, not empty.
    pub image: String,
    /// The point; `None` for the newest.
    pub point: Option<PointName>,
}

impl FromStr for PointSpec {
    type Err = ValueError;

    /// What stands behind the last `@` is a point if it can be one. Else it belongs to the image's name,
    /// which may hold anything.
    fn from_str(text: &str) -> Result<Self, ValueError> {
        if let Some((image, point)) = text.rsplit_once('@')
            && let Ok(point) = PointName::parse(point)
            && !image.is_empty()
        {
            return Ok(Self { image: image.to_owned(), point: Some(point) });
        }
        Ok(Self { image: non_empty(text)?, point: None })
    }
}

/// A name that is not empty.
pub fn non_empty(text: &str) -> Result<String, ValueError> {
    if text.is_empty() { Err(ValueError::Empty) } else { Ok(text.to_owned()) }
}

/// A client's full name, `client.admin` for instance.
pub fn entity(text: &str) -> Result<String, ValueError> {
    match text.split_once('.') {
        Some((kind, id)) if !kind.is_empty() && !id.is_empty() => Ok(text.to_owned()),
        _ => Err(ValueError::Entity),
    }
}

/// How many points a rule keeps. -1 is what restic and borg call `unlimited`.
pub fn limit(text: &str) -> Result<Limit, ValueError> {
    match text {
        "unlimited" | "-1" => Ok(Limit::All),
        // Not left to `parse` alone, which takes a plus sign.
        _ if !text.bytes().all(|digit| digit.is_ascii_digit()) => Err(ValueError::Limit),
        _ => text.parse().map(Limit::AtMost).map_err(|_| ValueError::Limit),
    }
}

/// A name that may be that of a point: whose it is shows among what is there.
pub fn with_point(text: &str) -> Result<String, ValueError> {
    match text.rsplit_once('@') {
        Some((image, point)) if !image.is_empty() && !point.is_empty() => Ok(text.to_owned()),
        _ => Err(ValueError::NoPoint),
    }
}

/// A share in percent: above 0, at most 100.
pub fn percent(text: &str) -> Result<f64, ValueError> {
    let share: f64 = text.strip_suffix('%').unwrap_or(text).parse().map_err(|_| ValueError::Percent)?;
    if share > 0.0 && share <= 100.0 { Ok(share) } else { Err(ValueError::Percent) }
}

/// A number of bytes, not 0. The suffixes K, M, G and T stand for powers of 1024.
pub fn bytes(text: &str) -> Result<u64, ValueError> {
    let shift = match text.bytes().last().map(|suffix| suffix.to_ascii_uppercase()) {
        Some(b'K') => 10,
        Some(b'M') => 20,
        Some(b'G') => 30,
        Some(b'T') => 40,
        _ => 0,
    };
    let digits = if shift == 0 { text } else { &text[..text.len() - 1] };
    // Not left to `parse`, which takes a plus sign and tells "too large" no differently.
    if digits.is_empty() || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return Err(ValueError::Bytes);
    }
    let number: u64 = digits.parse().map_err(|_| ValueError::TooLarge)?;
    match number.checked_mul(1 << shift) {
        None => Err(ValueError::TooLarge),
        Some(0) => Err(ValueError::Zero),
        Some(bytes) => Ok(bytes),
    }
}

/// A cluster size that qcow2 has.
pub fn cluster_size(text: &str) -> Result<u32, ValueError> {
    match u32::try_from(bytes(text)?) {
        Ok(size) if size.is_power_of_two() && (512..=2 << 20).contains(&size) => Ok(size),
        _ => Err(ValueError::ClusterSize),
    }
}

/// An object size that RBD has.
pub fn object_size(text: &str) -> Result<u64, ValueError> {
    match bytes(text)? {
        size if size.is_power_of_two() && (4 << 10..=32 << 20).contains(&size) => Ok(size),
        _ => Err(ValueError::ObjectSize),
    }
}

/// A feature that an image can be created with.
pub fn feature(text: &str) -> Result<Features, ValueError> {
    // The pool of the data says it all.
    let choosable = Features::SETTABLE.without(Features::DATA_POOL);
    Features::named(text).filter(|feature| choosable.has(*feature)).ok_or(ValueError::Feature)
}

/// A key, not empty, and its value.
pub fn key_value(text: &str) -> Result<(String, String), ValueError> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(ValueError::KeyValue),
    }
}

/// How clusters are stored.
pub fn compression(text: &str) -> Result<Compression, ValueError> {
    let level = text.starts_with("zstd:");
    text.parse().map_err(|_| if level { ValueError::Level } else { ValueError::Compression })
}
