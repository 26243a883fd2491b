//! Files to read: as they are in the input, or built after what the input says.

use std::io::Write;
use std::sync::Arc;

use flate2::Compression;
use flate2::write::DeflateEncoder;
use rbd2qcow2_core::qcow2::file::ReadAt;

/// A file in memory that has holes, so that large clusters and far offsets cost nothing.
#[derive(Clone)]
pub struct Image {
    pub length: u64,
    /// From here on, what no piece covers is a pattern in which no two places look alike; before,
    /// zeroes.
    pattern_from: u64,
    /// Offset and content; later ones lie over earlier ones.
    pieces: Arc<Vec<(u64, Vec<u8>)>>,
}

impl Image {
    /// The file that consists of `bytes`.
    pub fn whole(bytes: &[u8]) -> Self {
        Self {
            length: bytes.len() as u64,
            pattern_from: u64::MAX,
            pieces: Arc::new(vec![(0, bytes.to_vec())]),
        }
    }

    /// Up to `count` bytes from `from` on: as many as there are.
    pub fn bytes(&self, from: u64, count: usize) -> Vec<u8> {
        let count = self.length.saturating_sub(from).min(count as u64);
        let mut bytes = vec![0; count as usize];
        self.fill(&mut bytes, from);
        bytes
    }

    fn fill(&self, target: &mut [u8], from: u64) {
        let end = from + target.len() as u64;
        let zeroes = self.pattern_from.saturating_sub(from).min(target.len() as u64);
        let (zeroes, pattern) = target.split_at_mut(zeroes as usize);
        zeroes.fill(0);
        for (byte, at) in pattern.iter_mut().zip(from + zeroes.len() as u64..) {
            *byte = (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
        }
        for (start, piece) in self.pieces.iter() {
            let (first, last) = (from.max(*start), end.min(start.saturating_add(piece.len() as u64)));
            if first < last {
                target[(first - from) as usize..(last - from) as usize]
                    .copy_from_slice(&piece[(first - start) as usize..(last - start) as usize]);
            }
        }
    }
}

impl ReadAt for Image {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
        let count = self.length.saturating_sub(offset).min(buf.len() as u64) as usize;
        self.fill(&mut buf[..count], offset);
        Ok(count)
    }
}

/// Takes numbers from the input; zeroes when it is used up.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    pub fn take<const N: usize>(&mut self) -> u64 {
        let mut number = 0;
        for _ in 0..N {
            number = number << 8 | u64::from(self.byte());
        }
        number
    }

    pub fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }
}

/// Base-2 logarithms of cluster sizes: all, but mostly small ones. Opening a file reads its first
/// cluster.
const CLUSTER_BITS: [u32; 16] = [9, 9, 9, 10, 11, 12, 12, 13, 14, 14, 14, 15, 16, 17, 19, 21];

/// Length of the header that is built, without extensions.
const HEADER_LENGTH: u32 = 112;

/// Most entries, patches and data of a file that is built.
const STEPS: usize = 150;

/// How often the compressor may be called for a file, which takes more time than all else.
const DEFLATED: usize = 1;

/// Builds a file whose header is right, and whose tables mostly are: it would take a fuzzer long to
/// come by one with large clusters, or with compressed data.
///
/// The first clusters are the header, the refcount table, the L1 table with four entries, and two L2
/// tables.
pub fn build(input: &mut Input, backing: Option<&str>) -> Image {
    let (shape, flags) = (input.byte(), input.byte());
    let bits = CLUSTER_BITS[usize::from(shape % 16)];
    let cluster = 1_u64 << bits;
    let v2 = flags & 1 != 0;
    let extended = !v2 && flags & 2 != 0 && bits >= 14;
    let zstd = !v2 && flags & 4 != 0;
    let entry_bytes = if extended { 16 } else { 8 };
    let coverage = cluster / entry_bytes * cluster;
    let number = input.take::<2>();
    let size = if flags & 8 != 0 { coverage * 4 - number } else { (number * 64).min(coverage * 4) };
    let clusters = u64::from(input.byte());
    let length = match flags & 16 {
        0 => cluster * (5 + clusters % 32) - u64::from(input.byte()) % 128,
        _ => 1 << (36 + clusters % 22),
    };

    let mut header = Vec::new();
    let mut put = |bytes: &[u8]| header.extend_from_slice(bytes);
    let length_of_header = if v2 { 72 } else { HEADER_LENGTH };
    let format: &[u8] = match backing {
        Some(_) => b"\xe2\x79\x2a\xca\0\0\0\x05qcow2\0\0\0\0\0\0\0\0\0\0\0",
        None => b"\0\0\0\0\0\0\0\0",
    };
    put(b"QFI\xfb");
    put(&(if v2 { 2_u32 } else { 3 }).to_be_bytes());
    let name_offset = u64::from(length_of_header) + format.len() as u64;
    put(&backing.map_or(0, |_| name_offset).to_be_bytes());
    put(&(backing.map_or(0, str::len) as u32).to_be_bytes());
    put(&bits.to_be_bytes());
    put(&size.to_be_bytes());
    put(&0_u32.to_be_bytes());
    put(&4_u32.to_be_bytes());
    put(&(cluster * 2).to_be_bytes());
    put(&cluster.to_be_bytes());
    put(&1_u32.to_be_bytes());
    put(&[0; 12]);
    if !v2 {
        put(&(u64::from(zstd) << 3 | u64::from(extended) << 4).to_be_bytes());
        put(&[0; 16]);
        put(&4_u32.to_be_bytes());
        put(&HEADER_LENGTH.to_be_bytes());
        put(&[u8::from(zstd), 0, 0, 0, 0, 0, 0, 0]);
    }
    put(format);
    put(backing.unwrap_or_default().as_bytes());

    let mut builder = Builder { cluster, extended, zstd, deflated: 0, length, pieces: vec![(0, header)] };
    builder.l1(input);
    builder.rest(input);
    Image { length, pattern_from: cluster * 5, pieces: Arc::new(builder.pieces) }
}

struct Builder {
    cluster: u64,
    extended: bool,
    zstd: bool,
    /// How often the compressor was called.
    deflated: usize,
    length: u64,
    pieces: Vec<(u64, Vec<u8>)>,
}

const COPIED: u64 = 1 << 63;

impl Builder {
    fn put(&mut self, at: u64, number: u64) {
        self.pieces.push((at, number.to_be_bytes().to_vec()));
    }

    fn l1(&mut self, input: &mut Input) {
        let kinds = input.take::<2>();
        for index in 0..4 {
            let entry = match kinds >> (index * 4) & 15 {
                0..6 => (self.cluster * 3) | COPIED,
                6..10 => (self.cluster * 4) | COPIED,
                10..13 => 0,
                13 => self.cluster * u64::from(input.byte()),
                14 => COPIED,
                _ => input.take::<8>(),
            };
            self.put(self.cluster * 2 + index * 8, entry);
        }
    }

    /// A place for a cluster: near, or anywhere.
    fn place(&self, input: &mut Input) -> u64 {
        let number = u64::from(input.byte());
        if number < 224 { self.cluster * (5 + number % 32) } else { input.take::<7>() & !(self.cluster - 1) }
    }

    fn rest(&mut self, input: &mut Input) {
        let (mut table, mut index) = (3, 0);
        for _ in 0..STEPS {
            if input.0.is_empty() {
                break;
            }
            let step = input.byte();
            let argument = u64::from(step >> 4);
            let entry = match step & 15 {
                0 => 0,
                1..=3 => self.place(input) | if argument & 1 == 1 { COPIED } else { 0 },
                4 => 1,
                5 => 1 | self.place(input),
                6 => self.compressed(input, argument),
                7 => self.packed(input, argument),
                8 => input.take::<8>(),
                9 => {
                    index += argument;
                    continue;
                }
                10 => {
                    // The other table, or the same from its end.
                    table = 3 + (argument & 1);
                    index = if argument & 2 == 0 { 0 } else { self.entries() - 1 - (argument >> 2) };
                    continue;
                }
                11 => {
                    // A byte of the header or of any table, for what nothing else here does.
                    let at = u64::from(input.byte());
                    let byte = input.byte();
                    self.pieces.push((self.cluster * (argument % 6) + at, vec![byte]));
                    continue;
                }
                12 => {
                    let at = self.cluster * 5 + input.take::<2>();
                    let count = (argument as usize * 4).min(input.0.len());
                    let (data, rest) = input.0.split_at(count);
                    self.pieces.push((at, data.to_vec()));
                    input.0 = rest;
                    continue;
                }
                _ => self.place(input),
            };
            let at = self.cluster * table + index % self.entries() * self.entry_bytes();
            self.put(at, entry);
            if self.extended {
                let standard = entry >> 62 & 1 == 0;
                let bitmap = if standard || argument == 15 { self.bitmap(input, entry) } else { 0 };
                self.put(at + 8, bitmap);
            }
            index += 1;
        }
    }

    fn entry_bytes(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    fn entries(&self) -> u64 {
        self.cluster / self.entry_bytes()
    }

    fn bitmap(&self, input: &mut Input, entry: u64) -> u64 {
        let kind = input.byte();
        let allocated = match kind & 7 {
            0 => return input.take::<8>(),
            1 => u64::from(u32::MAX),
            2 | 3 => input.take::<4>(),
            _ => u64::from(input.byte()) << (kind >> 3),
        } & u64::from(u32::MAX);
        let zeroes = if kind & 2 != 0 { input.take::<4>() } else { 0 };
        if entry & !COPIED == 0 { zeroes << 32 } else { allocated | (zeroes & !allocated) << 32 }
    }

    /// An entry for compressed data at any place, `sectors` long.
    fn compressed(&self, input: &mut Input, sectors: u64) -> u64 {
        let near = self.cluster * 5 + input.take::<2>();
        let host = if near & 63 == 63 { input.take::<7>() } else { near };
        self.descriptor(host, sectors)
    }

    fn descriptor(&self, host: u64, sectors: u64) -> u64 {
        let shift = 62 - (self.cluster.ilog2() - 8);
        1 << 62 | (sectors << shift | host) & !(3 << 62)
    }

    /// An entry for compressed data, and the data: whole, cut, or followed by others.
    fn packed(&mut self, input: &mut Input, argument: u64) -> u64 {
        if self.cluster > 16384 || self.pieces.iter().map(|(_, piece)| piece.len()).sum::<usize>() > 32768 {
            return 0;
        }
        let (seed, near) = (input.byte(), input.take::<2>());
        let count = match argument & 7 {
            0 => self.cluster - 1,
            1 => self.cluster + 1,
            _ => self.cluster,
        };
        let repeated = u64::from(seed >> 3) + 1;
        let data: Vec<u8> = (0..count).map(|at| (at % repeated) as u8 ^ seed).collect();
        // In two parts, or in one.
        let (first, second) = data.split_at(if argument & 7 == 3 { data.len() / 3 } else { 0 });
        let mut packed = Vec::new();
        match self.zstd {
            true => {
                if !first.is_empty() {
                    frame(&mut packed, first);
                }
                frame(&mut packed, second);
            }
            false if self.cluster == 512 && self.deflated < DEFLATED => {
                self.deflated += 1;
                let mut encoder = DeflateEncoder::new(&mut packed, Compression::fast());
                encoder.write_all(&data).expect("memory");
                encoder.finish().expect("memory");
            }
            false => {
                stored(&mut packed, first, argument & 7 == 4);
                stored(&mut packed, second, true);
            }
        }
        let host = (self.cluster * 5 + near).min(self.length);
        let sectors = (host % 512 + packed.len() as u64).div_ceil(512) - 1;
        if argument & 8 != 0 {
            packed.pop();
            let at = usize::from(input.byte()) % packed.len().max(1);
            if let Some(byte) = packed.get_mut(at) {
                *byte ^= input.byte();
            }
        }
        self.pieces.push((host, packed));
        self.descriptor(host, sectors)
    }
}

/// Appends a block of a deflate stream that is not compressed: a compressor takes too much time for
/// each input.
fn stored(packed: &mut Vec<u8>, data: &[u8], last: bool) {
    let length = data.len() as u16;
    packed.push(u8::from(last));
    packed.extend(length.to_le_bytes());
    packed.extend((!length).to_le_bytes());
    packed.extend(data);
}

/// Appends a zstd frame of one block: one byte and how often it is there, or what is not compressed.
fn frame(packed: &mut Vec<u8>, data: &[u8]) {
    let length = data.len() as u32;
    let alike = data.iter().all(|byte| *byte == data[0]);
    packed.extend(b"\x28\xb5\x2f\xfd\xa0");
    packed.extend(length.to_le_bytes());
    packed.extend(&(length << 3 | u32::from(alike) << 1 | 1).to_le_bytes()[..3]);
    packed.extend(if alike { &data[..1] } else { data });
}
