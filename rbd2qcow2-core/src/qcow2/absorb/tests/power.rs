//! Power failures: of what was not brought to stable storage, anything may be there, or not.

use std::cell::RefCell;

use super::*;

/// A change that is not on stable storage yet.
enum Change {
    Write(u64, Vec<u8>),
    Length(u64),
}

/// A file, and what of it is on stable storage.
struct Volatile {
    now: Faulty,
    stable: File,
    changes: RefCell<Vec<Change>>,
    /// How many changes there were when all was copied, and when the table was replaced, too.
    copied: Cell<usize>,
    switched: Cell<usize>,
}

impl Volatile {
    fn new(path: &Path, stable: &Path) -> Self {
        fs::copy(path, stable).expect("copied");
        let stable = File::options().write(true).open(stable).expect("opened");
        Self {
            now: Faulty { torn: false, ..Faulty::new(path, usize::MAX) },
            stable,
            changes: RefCell::default(),
            copied: Cell::default(),
            switched: Cell::default(),
        }
    }

    /// Another process begins, which dies after so many changes. Nothing is lost with the one before.
    fn attempt(&mut self, above: &LayerReader, dies_after: usize) -> Result<(), AbsorbError> {
        self.now.fails_at = dies_after;
        self.now.done.set(0);
        let (below, progress, cancel) = (self.now.reader(), Amount::default(), Cancel::new());
        let mut absorb = Absorb::new(self, &below, above, &progress, &cancel)?;
        absorb.copy()?;
        self.copied.set(self.now.done.get());
        absorb.switch()?;
        self.switched.set(self.now.done.get());
        absorb.finish(&self.now.reader())
    }

    /// The power fails: of all changes that are not safe, those remain that `remains` says.
    fn power_fails(self, mut remains: impl FnMut() -> bool) {
        for change in self.changes.into_inner() {
            if remains() {
                apply(&self.stable, &change);
            }
        }
    }
}

fn apply(file: &File, change: &Change) {
    match change {
        Change::Write(offset, bytes) => file.write_all_at(bytes, *offset).expect("written"),
        Change::Length(length) => file.set_len(*length).expect("set"),
    }
}

impl Medium for Volatile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.now.write_at(offset, bytes)?;
        // Page by page.
        for (start, page) in (offset..).step_by(4096).zip(bytes.chunks(4096)) {
            self.changes.borrow_mut().push(Change::Write(start, page.to_vec()));
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.now.sync()?;
        self.changes.take().iter().for_each(|change| apply(&self.stable, change));
        Ok(())
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.now.discard(range.clone())?;
        let bytes = vec![0xdd; (range.end - range.start) as usize];
        self.changes.borrow_mut().push(Change::Write(range.start, bytes));
        Ok(())
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.now.set_length(length)?;
        self.changes.borrow_mut().push(Change::Length(length));
        Ok(())
    }
}

/// A process dies at any change, a second one at any other, and then the power fails: read through the layer
/// above, nothing has changed, and the next attempt completes it.
#[test]
fn what_was_not_flushed_may_be_lost() {
    let directory = tempfile::tempdir().expect("a directory");
    let old = vec![(500_000, Stretch::Text(3)), (400_000, Stretch::Noise(5)), (100_000, Stretch::Zeroes)];
    let new = vec![(60_000, Stretch::Old), (9_000, Stretch::Noise(7)), (70_000, Stretch::Zeroes)];
    for compression in [Compression::None, Compression::Zstd { level: None }] {
        // Clusters of 4 KiB, so that there are several tables, which come and go.
        let form = Form { cluster_bits: 12, ..plain(compression) };
        let images = [&(4 << 20, old.clone()), &(4 << 20, new.clone())];
        let (below, above, wanted) = pair(directory.path(), &form, images);
        let above_reader = LayerReader::open(&above).expect("readable");
        let before = fs::read(&below).expect("read");
        let (path, stable) = (directory.path().join("now"), directory.path().join("stable"));
        let (copied, switched, steps) = {
            fs::write(&path, &before).expect("written");
            let mut medium = Volatile::new(&path, &stable);
            medium.attempt(&above_reader, usize::MAX).expect("absorbed");
            (medium.copied.get(), medium.switched.get(), medium.now.done.get())
        };
        let mut state = 1_u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for round in 0..120 {
            fs::write(&path, &before).expect("written");
            let mut medium = Volatile::new(&path, &stable);
            // Most often when the table has been replaced, and when places that are free since are taken.
            let mut less = |end: usize| random() as usize % end;
            let cuts = match round % 4 {
                0 => [less(steps), less(steps)],
                1 => [copied + less(switched - copied + 2), less(steps)],
                _ => [switched, less(copied)],
            };
            for cut in cuts {
                let _ = medium.attempt(&above_reader, cut);
            }
            let share = random() % 4;
            medium.power_fails(|| random() % 4 <= share);
            let context = format!("{compression}, round {round}, cut at {cuts:?} of {steps}");
            fs::rename(&stable, &below).expect("renamed");
            assert_content(&[above.clone(), below.clone()], &wanted, &context);
            Faulty::new(&below, usize::MAX).absorb(&above_reader).expect("completed");
            assert_content(std::slice::from_ref(&below), &wanted, &context);
            assert_clean(&below, &context);
        }
        fs::remove_file(above).expect("removed");
        fs::remove_file(below).expect("removed");
    }
}
