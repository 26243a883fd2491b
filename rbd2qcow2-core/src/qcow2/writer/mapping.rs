//! The L1 table and the L2 tables.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{FileSpec, Qcow2Writer, WriteError, index, l2_coverage, l2_entry_numbers};
use crate::qcow2::table::{GuestOffset, HostOffset, L1Entry, L2Entry};

/// Memory for L2 tables, in bytes: with clusters of 128 KiB and extended entries they describe
/// 64 GiB. A copy passes from front to back, so most tables are written once.
const OPEN_BYTES: u64 = 8 << 20;

/// L2 tables in memory, whatever their size: so many parts of the image may be written at once. In
/// unit tests one, so that tables come and go.
const OPEN_LEAST: u64 = if cfg!(test) { 1 } else { 4 };
const OPEN_MOST: u64 = if cfg!(test) { 1 } else { 1024 };

/// Which cluster of the guest is where.
#[derive(Debug)]
pub(super) struct Mapping {
    /// Numbers of 8 bytes in an L2 entry.
    entry_numbers: u64,
    /// Entries of an L2 table.
    table_entries: u64,
    /// Clusters of the image.
    clusters: u64,
    tables: Mutex<Tables>,
}

#[derive(Debug)]
struct Tables {
    /// Where each L2 table lies, once it has been written.
    hosts: Vec<Option<HostOffset>>,
    /// The L2 tables in memory, by their index in the L1 table.
    open: BTreeMap<u64, OpenTable>,
    limit: usize,
    now: u64,
}

#[derive(Debug)]
struct OpenTable {
    numbers: Vec<u64>,
    /// When it was used last.
    used: u64,
}

impl Mapping {
    pub(super) fn new(spec: &FileSpec, l1_entries: u64) -> Self {
        let entry_numbers = l2_entry_numbers(spec);
        let limit = (OPEN_BYTES / spec.cluster_bits.size()).clamp(OPEN_LEAST, OPEN_MOST);
        let tables = Tables {
            hosts: vec![None; index(l1_entries)],
            open: BTreeMap::new(),
            limit: index(limit),
            now: 0,
        };
        Self {
            entry_numbers,
            table_entries: l2_coverage(spec) / spec.cluster_bits.size(),
            clusters: spec.virtual_size.div_ceil(spec.cluster_bits.size()),
            tables: Mutex::new(tables),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the entries of the clusters from number `first` on. Each may be set once.
    pub(super) fn set(
        &self,
        first: u64,
        entries: impl IntoIterator<Item = L2Entry>,
        file: &Qcow2Writer,
    ) -> Result<(), WriteError> {
        let bits = file.spec.cluster_bits.bits();
        let mut tables = self.lock();
        let mut entries = (first..).zip(entries).peekable();
        while let Some((cluster, _)) = entries.peek() {
            if *cluster >= self.clusters {
                return Err(WriteError::Twice { guest: GuestOffset(cluster << bits) });
            }
            let number = cluster / self.table_entries;
            let table = self.open(&mut tables, number, file)?;
            while let Some((cluster, entry)) =
                entries.next_if(|(cluster, _)| cluster / self.table_entries == number)
            {
                let start = index(cluster % self.table_entries * self.entry_numbers);
                let place = &mut table[start..start + index(self.entry_numbers)];
                if cluster >= self.clusters || place.iter().any(|number| *number != 0) {
                    return Err(WriteError::Twice { guest: GuestOffset(cluster << bits) });
                }
                let (raw, bitmap) = entry.encode(bits, file.spec.extended_l2);
                place.copy_from_slice(&[raw, bitmap][..place.len()]);
            }
        }
        Ok(())
    }

    /// The table `number`, from memory or else from the file. Another one makes room for it.
    fn open<'a>(
        &self,
        tables: &'a mut Tables,
        number: u64,
        file: &Qcow2Writer,
    ) -> Result<&'a mut [u64], WriteError> {
        if !tables.open.contains_key(&number) {
            if tables.open.len() >= tables.limit {
                let oldest = tables.open.iter().min_by_key(|(_, table)| table.used);
                if let Some(oldest) = oldest.map(|(number, _)| *number) {
                    tables.close(oldest, file)?;
                }
            }
            let mut numbers = vec![0; index(self.table_entries * self.entry_numbers)];
            if let Some(host) = tables.hosts.get(index(number)).copied().flatten() {
                file.read_table(host, &mut numbers)?;
            }
            tables.open.insert(number, OpenTable { numbers, used: 0 });
        }
        tables.now += 1;
        let now = tables.now;
        let table = tables.open.entry(number).or_insert_with(|| unreachable!("it is open"));
        table.used = now;
        Ok(&mut table.numbers)
    }

    /// Writes all tables that are still in memory, and the L1 table.
    pub(super) fn finish(&self, file: &Qcow2Writer) -> Result<(), WriteError> {
        let mut tables = self.lock();
        while let Some(number) = tables.open.keys().next().copied() {
            tables.close(number, file)?;
        }
        let entries: Vec<u64> = tables.hosts.iter().map(|host| L1Entry { table: *host }.encode()).collect();
        file.write_table(HostOffset(file.l1_table.offset), &entries)
    }
}

impl Tables {
    /// Writes the table `number` and forgets it. Its place in the file it keeps.
    fn close(&mut self, number: u64, file: &Qcow2Writer) -> Result<(), WriteError> {
        let Some(table) = self.open.remove(&number) else { return Ok(()) };
        let known = &mut self.hosts[index(number)];
        let host = match *known {
            Some(host) => host,
            None => *known.insert(file.space.take(1)?),
        };
        file.write_table(host, &table.numbers)
    }
}
