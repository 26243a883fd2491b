//! Chains of more files than can be open.

use std::fs;
use std::path::Path;

use super::*;

/// Descriptors of this process that lead into a directory.
fn open_in(directory: &Path) -> usize {
    let open = fs::read_dir("/proc/self/fd").expect("Linux");
    open.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter(|path| path.starts_with(directory))
        .count()
}

/// A chain of `count` layers, the newest first, each of which holds a cluster of its own.
fn chain_of(directory: &Path, count: usize) -> (Vec<PathBuf>, Vec<u8>) {
    let form = Form {
        cluster_bits: 16,
        extended_l2: ExtendedL2::Off,
        compression: Compression::None,
        block: 1 << 16,
    };
    let mut content = vec![0; count << 16];
    let mut paths: Vec<PathBuf> = Vec::new();
    for number in 0..count {
        let old = content.clone();
        fill(&mut content[number << 16..(number + 1) << 16], &[], &Stretch::Noise(number as u64 + 7));
        let below = number.checked_sub(1).map(|below| format!("layer{below}"));
        let base = below.is_some().then_some(&old[..]);
        let spec = spec_of(directory, &format!("layer{number}"), content.len(), below, &form);
        write(&spec, &content, base, form.block);
        paths.insert(0, spec.path);
    }
    (paths, content)
}

#[test]
fn no_more_files_are_open_than_there_is_room_for() {
    let directory = tempfile::tempdir().expect("a directory");
    let (paths, content) = chain_of(directory.path(), 9);
    for room in [1, 9] {
        let chain = ChainReader::open_within(&paths, false, room).expect("a chain");
        let all_share = |pair: &[LayerReader]| pair[0].pages().shares_with(pair[1].pages());
        assert!(chain.layers().windows(2).all(all_share), "one limit of memory for all");
    }
    for (once, room, most) in [(false, 9, 9), (false, 8, 8), (true, 18, 18), (true, 17, 17), (true, 1, 1)] {
        let chain = ChainReader::open_within(&paths, once, room).expect("a chain");
        assert!(open_in(directory.path()) <= most);
        for seed in 0..3 {
            read_at_random(&chain, &content, seed);
            let open = open_in(directory.path());
            assert!(open <= most && open > 0, "{open} of {most} are open");
        }
        // Aligned, so that reads past the page cache are among them.
        let pool = crate::buffer::BufferPool::new(1 << 20);
        let mut all = pool.get(content.len(), &crate::cancel::Cancel::new()).expect("not cancelled");
        chain.read_at(0, &mut all).expect("readable");
        assert!(all[..] == content[..]);
        assert!(open_in(directory.path()) <= most);
    }
    assert_eq!(open_in(directory.path()), 0, "all are closed in the end");
}

#[test]
fn threads_share_what_is_open() {
    let directory = tempfile::tempdir().expect("a directory");
    let (paths, content) = chain_of(directory.path(), 9);
    let chain = ChainReader::open_within(&paths, true, 3).expect("a chain");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (chain, content) = (&chain, &content);
            scope.spawn(move || (0..10).for_each(|seed| read_at_random(chain, content, 4 * seed + thread)));
        }
    });
}

#[test]
fn a_file_that_was_exchanged_is_not_read() {
    let directory = tempfile::tempdir().expect("a directory");
    let (paths, content) = chain_of(directory.path(), 4);
    let (oldest, aside) = (&paths[3], directory.path().join("aside"));
    let changes: [(&str, &dyn Fn()); 4] = [
        ("replaced by a copy", &|| {
            fs::copy(oldest, &aside).expect("a copy");
            fs::rename(&aside, oldest).expect("renamed");
        }),
        ("longer", &|| {
            let file = fs::OpenOptions::new().write(true).open(oldest).expect("open");
            file.set_len(file.metadata().expect("a file").len() + 1).expect("longer");
        }),
        ("written to", &|| {
            let file = fs::OpenOptions::new().write(true).open(oldest).expect("open");
            file.set_modified(std::time::UNIX_EPOCH).expect("set");
        }),
        ("removed", &|| fs::rename(oldest, &aside).expect("renamed")),
    ];
    for (what, change) in changes {
        let all_open = ChainReader::open_within(&paths, false, 4).expect("a chain");
        let on_demand = ChainReader::open_within(&paths, false, 2).expect("a chain");
        let mut buffer = vec![0; 1 << 16];
        // The oldest is read, and its tables are known; then it is closed for the others.
        for number in 0..3 {
            on_demand.read_at(number << 16, &mut buffer).expect("readable");
        }
        change();
        match on_demand.read_at(0, &mut buffer) {
            Err(ReadError::Replaced { path }) => assert_eq!(path, *oldest, "{what}"),
            other => panic!("{what}: {other:?}"),
        }
        all_open.read_at(0, &mut buffer).expect("readable");
        assert!(buffer == content[..1 << 16], "{what}: an open file is the one that was opened");
    }
}
