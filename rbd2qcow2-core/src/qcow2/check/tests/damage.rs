//! Files with one thing wrong: found, named, and as bad as QEMU says.

use super::*;
use crate::qcow2::table::{EntryFault, GuestOffset};

/// What is wrong, the changes, and what must be among the findings.
type Damage = (&'static str, Vec<Change>, Box<dyn Fn(&Finding) -> bool>);

fn damage(
    name: &'static str,
    changes: impl IntoIterator<Item = Change>,
    expected: impl Fn(&Finding) -> bool + 'static,
) -> Damage {
    (name, changes.into_iter().collect(), Box::new(expected))
}

fn is_entry(place: Place) -> impl Fn(&Finding) -> bool {
    move |finding| matches!(finding, Finding::Entry { place: found, .. } if *found == place)
}

fn is(expected: Finding) -> impl Fn(&Finding) -> bool {
    move |finding| *finding == expected
}

/// The offsets of a sample that damages are made of.
struct Parts {
    cluster: u64,
    end: u64,
    l1: [Place; 2],
    l2: [u64; 2],
    block: u64,
    data: u64,
}

impl Parts {
    fn of(sample: &Sample, variant: Variant) -> Self {
        let l1 = [0, 1].map(|index| Place::L1Entry { index, guest: GuestOffset(index * coverage(variant)) });
        let (cluster, length) = (sample.cluster(), sample.bytes.len() as u64);
        Self {
            cluster,
            end: length.next_multiple_of(cluster),
            l1,
            l2: [sample.l2(0), sample.l2(1)],
            block: sample.block(),
            data: sample.data(0, 1),
        }
    }

    /// The entry `index` of the first L2 table.
    fn entry(&self, index: u64) -> Place {
        let guest = GuestOffset(index * self.cluster);
        Place::L2Entry { table: HostOffset(self.l2[0]), index, guest }
    }
}

/// Wrong refcounts.
fn refcounts(sample: &Sample, parts: &Parts) -> Vec<Damage> {
    let mut damages = Vec::new();
    let places = [
        ("header", 0),
        ("L1 table", sample.header.l1_table.offset),
        ("refcount table", sample.header.refcount_table.offset),
        ("refcount block", parts.block),
        ("L2 table", parts.l2[1]),
        ("data", parts.data),
    ];
    for (name, host) in places {
        let host_offset = HostOffset(host);
        let too_small = Finding::RefcountTooSmall { host: host_offset, stored: 0, counted: 1 };
        damages.push(damage(name, [sample.refcounts(&[(host, 0)])], is(too_small)));
        if sample.width().bits() > 1 {
            let stored = sample.width().max();
            let leak = Finding::Leak { host: host_offset, stored, counted: 1 };
            damages.push(damage(name, [sample.refcounts(&[(host, stored)])], is(leak)));
        }
    }
    let set = Finding::CopiedSet { place: parts.entry(1), host: HostOffset(parts.data) };
    damages.push(damage("COPIED of refcount 0", [sample.refcounts(&[(parts.data, 0)])], is(set)));
    let leak = Finding::Leak { host: HostOffset(parts.end), stored: 1, counted: 0 };
    let more = [(parts.end, vec![7; 512]), sample.refcounts(&[(parts.end, 1)])];
    damages.push(damage("a leaked cluster", more, is(leak)));
    damages
}

/// Two users of one cluster.
fn shared(sample: &Sample, parts: &Parts, extended: bool) -> Vec<Damage> {
    let entry = |index| sample.l2_at(0, index);
    let used = |place, host| is(Finding::Shared { place, host: HostOffset(host) });
    let same = sample.number(entry(1));
    let half = if extended { vec![number(entry(2) + 8, sample.number(entry(1) + 8))] } else { Vec::new() };
    let mut copied = vec![number(entry(2), same)];
    copied.extend(half);
    let mut damages = vec![
        damage("an entry copied", copied.clone(), used(parts.entry(2), parts.data)),
        damage(
            "two L1 entries for a table",
            [number(sample.l1_at(1), sample.number(sample.l1_at(0)))],
            used(parts.l1[1], parts.l2[0]),
        ),
        damage(
            "data on an L2 table",
            [number(entry(1), COPIED | parts.l2[1])],
            used(parts.entry(1), parts.l2[1]),
        ),
        damage(
            "data on a refcount block",
            [number(entry(1), COPIED | parts.block)],
            used(parts.entry(1), parts.block),
        ),
        damage(
            "an L2 table on a refcount block",
            [number(sample.l1_at(1), COPIED | parts.block)],
            used(parts.l1[1], parts.block),
        ),
        damage(
            "two entries for a refcount block",
            [number(sample.reftable_at(1), parts.block)],
            move |finding| {
                let place = |place: &Place| matches!(place, Place::RefcountEntry { index: 1, .. });
                matches!(finding, Finding::Shared { place: found, .. } if place(found))
            },
        ),
    ];
    // Of one sector, at its place.
    let packed = |host: u64| number(entry(5), 1 << 62 | host);
    for (name, host) in [
        ("compressed data in an L2 table", parts.l2[1]),
        ("compressed data in a refcount block", parts.block),
        ("compressed data in plain data", parts.data),
    ] {
        damages.push(damage(name, [packed(host)], used(parts.entry(5), host)));
    }
    if sample.width().bits() > 1 {
        // As if there were an internal snapshot: QEMU has nothing against it.
        let counts = sample.refcounts(&[(parts.data, 2), (sample.data(0, 2), 0)]);
        copied.extend([counts, number(entry(1), same & !COPIED)]);
        copied.push(number(entry(2), same & !COPIED));
        damages.push(damage("an entry copied, counted", copied, used(parts.entry(2), parts.data)));
    }
    damages
}

/// Flags and entries that are wrong by themselves.
fn entries(sample: &Sample, parts: &Parts) -> Vec<Damage> {
    let entry = |index| sample.l2_at(0, index);
    let invert = |at: u64, bits: u64| [number(at, sample.number(at) ^ bits)];
    let host = HostOffset(parts.data);
    let table = HostOffset(parts.l2[1]);
    let astray = |place| is(Finding::CopiedAstray { place });
    let reftable = Place::RefcountEntry { index: 0, first: HostOffset(0) };
    let outside = parts.end + parts.cluster;
    let l1 = sample.header.l1_table.offset;
    let mut damages = vec![
        damage(
            "COPIED cleared of data",
            invert(entry(1), COPIED),
            is(Finding::CopiedClear { place: parts.entry(1), host }),
        ),
        damage(
            "COPIED cleared of a table",
            invert(sample.l1_at(1), COPIED),
            is(Finding::CopiedClear { place: parts.l1[1], host: table }),
        ),
        damage("COPIED set of compressed data", invert(entry(6), COPIED), astray(parts.entry(6))),
        damage("COPIED set of nothing", invert(entry(9), COPIED), astray(parts.entry(9))),
        damage("a reserved bit", invert(entry(1), 1 << 60), is_entry(parts.entry(1))),
        damage("a reserved bit of L1", invert(sample.l1_at(1), 4), is_entry(parts.l1[1])),
        damage("data outside", [number(entry(1), COPIED | outside)], is_entry(parts.entry(1))),
        damage("data on the L1 table", [number(entry(1), COPIED | l1)], is_entry(parts.entry(1))),
        damage("a table outside", [number(sample.l1_at(1), COPIED | outside)], is_entry(parts.l1[1])),
        damage("refcounts outside", [number(sample.reftable_at(0), outside)], is_entry(reftable)),
        damage("refcounts far outside", [number(sample.reftable_at(0), 1 << 63)], is_entry(reftable)),
        damage("refcounts on the L1 table", [number(sample.reftable_at(0), l1)], is_entry(reftable)),
        damage(
            "refcounts with a reserved bit",
            [number(sample.reftable_at(0), parts.block | 8)],
            is(Finding::Entry { place: reftable, fault: EntryFault::Reserved(8) }),
        ),
        damage(
            "a refcount block cut off",
            [
                (parts.end, sample.bytes[usize::try_from(parts.block).expect("small")..][..100].to_vec()),
                number(sample.reftable_at(0), parts.end),
            ],
            is(Finding::Entry {
                place: reftable,
                fault: EntryFault::OutsideFile { host: HostOffset(parts.end), file_bytes: parts.end + 100 },
            }),
        ),
    ];
    // Of all sectors that there can be, from the file's last cluster on.
    let sectors = (1 << (sample.header.cluster_bits.bits() - 8)) - 1;
    let last = parts.end - parts.cluster;
    let raw = 1 << 62 | sectors << (62 - (sample.header.cluster_bits.bits() - 8)) | last;
    damages.push(damage("compressed data behind the end", [number(entry(5), raw)], {
        let place = parts.entry(5);
        move |finding| matches!(finding, Finding::BehindEnd { place: found, .. } if *found == place)
    }));
    if parts.cluster > 512 {
        let fault = EntryFault::Misaligned(HostOffset(parts.block + 512));
        damages.push(damage(
            "refcounts misaligned",
            [number(sample.reftable_at(0), parts.block + 512)],
            is(Finding::Entry { place: reftable, fault }),
        ));
    }
    damages
}

#[test]
fn damage_is_found_and_named() {
    let Some(tools) = qemu() else {
        return;
    };
    let (mut leaks_only, mut stricter) = (0, 0);
    for variant in VARIANTS.into_iter().chain(every_width()) {
        let sample = Sample::with_everything(&tools, variant);
        compare_clean(&tools, &sample.path, &format!("{variant:?}"));
        let parts = Parts::of(&sample, variant);
        let extended = sample.header.extended_l2;
        let mut damages = refcounts(&sample, &parts);
        damages.extend(shared(&sample, &parts, extended));
        damages.extend(entries(&sample, &parts));
        for (name, changes, expected) in damages {
            let (ours, theirs) = sample.changed(&changes, |path| (checked(path), verdict(&tools, path)));
            let ours = ours.expect("readable");
            let named = ours.errors.iter().chain(&ours.leaks).any(expected);
            assert!(named, "{name}, {variant:?}: {ours:#?}, QEMU: {theirs:?}");
            let Some(theirs) = theirs else {
                continue;
            };
            assert!(
                theirs.errors() == 0 || ours.error_count > 0,
                "{name}, {variant:?}: {ours:#?} {theirs:?}"
            );
            if theirs.errors() == 0 && theirs.leaks > 0 {
                let found = (ours.error_count, ours.leak_count);
                assert_eq!(found, (0, theirs.leaks), "{name}, {variant:?}: {ours:#?}");
                leaks_only += 1;
            }
            stricter += u64::from(theirs.errors() == 0 && ours.error_count > 0);
        }
    }
    assert!(leaks_only >= 19 && stricter >= 19, "{leaks_only} {stricter}");
}

/// Where the tables and refcounts lie that are in use, as far as they fit into a few bytes.
fn structures(sample: &Sample) -> Vec<std::ops::Range<u64>> {
    let header = &sample.header;
    let mut found = vec![
        header.l1_table.offset..header.l1_table.offset + (header.l1_table.entries * 8).min(256),
        header.refcount_table.offset..header.refcount_table.offset + 32,
    ];
    for index in 0..header.l1_table.entries.min(32) {
        if sample.l2(index) != 0 {
            found.push(sample.l2(index)..sample.l2(index) + sample.cluster().min(1024));
        }
    }
    let clusters = sample.bytes.len() as u64 / sample.cluster();
    let used = (clusters * u64::from(sample.width().bits()) / 8 + 1).min(sample.cluster());
    found.push(sample.block()..sample.block() + used);
    found
}

#[test]
fn what_is_clean_for_us_is_clean_for_qemu() {
    let Some(tools) = qemu() else {
        return;
    };
    let (mut clean, mut leaks, mut errors) = (0, 0, 0);
    for (round, variant) in VARIANTS.into_iter().chain(every_width()).enumerate() {
        let mut random = Random::new(0xf11b + round as u64);
        let directory = tempfile::tempdir().expect("a directory");
        make(&tools, directory.path(), "sample", None, variant, (2 << 20) + 512, &mut random);
        let sample = Sample::new(directory, "sample");
        let structures = structures(&sample);
        for flip in 0..40 {
            // The small ones as often as the large.
            let range = &structures[usize::try_from(random.below(structures.len() as u64)).expect("small")];
            let at = range.start + random.below(range.end - range.start);
            let old = sample.bytes[usize::try_from(at).expect("in memory")];
            let change = (at, vec![old ^ 1 << random.below(8)]);
            let (ours, theirs) = sample.changed(&[change], |path| (checked(path), verdict(&tools, path)));
            let ours = ours.expect("readable");
            let about = format!("{variant:?}, flip {flip} at {at:#x}: {ours:#?}, QEMU: {theirs:?}");
            let Some(theirs) = theirs else {
                assert!(!ours.is_clean(), "{about}");
                continue;
            };
            if theirs.errors() > 0 {
                assert!(ours.error_count > 0, "{about}");
                errors += 1;
            } else if theirs.leaks > 0 {
                assert!(ours.error_count > 0 || ours.leak_count == theirs.leaks, "{about}");
                leaks += 1;
            }
            clean += u64::from(ours.is_clean());
        }
    }
    assert!(clean > 20 && leaks > 20 && errors > 200, "{clean} {leaks} {errors}");
}

/// The header's own damage is no finding, but keeps a file from being opened: by us, whenever by QEMU.
#[test]
fn an_accepted_header_opens_in_qemu() {
    const LENGTH: u64 = 112;
    let Some(tools) = qemu() else {
        return;
    };
    let variant = Variant { cluster: 4096, options: "compat=1.1,compression_type=zstd" };
    let sample = Sample::with_everything(&tools, variant);
    assert_eq!(u64::from(sample.header.header_length), LENGTH);
    let mut random = Random::new(0x4ead);
    // Each byte of the header and its first extension, but for the magic number.
    let flips = (4..LENGTH + 8).map(|at| {
        let old = sample.bytes[usize::try_from(at).expect("small")];
        vec![(at, vec![old ^ 1 << random.below(8)])]
    });
    let extensions = [0, 0xe279_2aca, 0x2385_2875, 0x0537_be77, 0x6803_f857, 0x1234_5678].into_iter();
    let extensions = extensions.flat_map(|kind: u32| {
        let of_length = move |length: u32| [kind.to_be_bytes(), length.to_be_bytes()].concat();
        [0, 8, 15, 16, 24, 4096 - 120, 4096 - 119].map(|length| vec![(LENGTH, of_length(length))])
    });
    // No name at an offset where extensions end, and behind the first cluster.
    let names = [100, 116, 120, 121, 4096, 4097].map(|offset| vec![number(8, offset)]);
    let (mut both, mut refused) = (0, 0);
    for change in flips.chain(extensions).chain(names) {
        let (ours, theirs) = sample.changed(&change, |path| (checked(path), verdict(&tools, path)));
        let Ok(ours) = ours else {
            refused += 1;
            continue;
        };
        let errors = theirs.as_ref().map(Verdict::errors);
        assert!(!ours.is_clean() || errors == Some(0), "{change:?}: QEMU: {theirs:?}");
        both += u64::from(ours.is_clean());
    }
    assert!(both > 30 && refused > 30, "{both} {refused}");
}

#[test]
fn findings_name_the_place() {
    let place = Place::L2Entry { table: HostOffset(0x50000), index: 3, guest: GuestOffset(0x30000) };
    let expected = [
        (
            Finding::Shared { place, host: HostOffset(0x70000) },
            "entry 3 of the L2 table at 0x50000 (guest offset 0x30000) uses the cluster at 0x70000, which \
             something else uses already",
        ),
        (
            Finding::Leak { host: HostOffset(0x10000), stored: 2, counted: 1 },
            "the cluster at 0x10000 has a refcount of 2, but is used 1 times",
        ),
        (
            Finding::Entry {
                place: Place::RefcountEntry { index: 1, first: HostOffset(0x8000_0000) },
                fault: EntryFault::Reserved(1),
            },
            "entry 1 of the refcount table (for clusters from 0x80000000 on) is invalid",
        ),
    ];
    for (finding, text) in expected {
        assert_eq!(finding.to_string(), text);
        assert_eq!(finding.is_leak(), matches!(finding, Finding::Leak { .. }));
    }
}
