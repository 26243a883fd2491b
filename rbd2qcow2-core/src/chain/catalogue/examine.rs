//! Reading the files of one point, and comparing what they say.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::directory::{OfPoint, Presence};
use super::point::Link;
use super::{Catalogue, PYTHON_ROOT, Point, PointKind, Problem};
use crate::chain::manifest::{Manifest, ManifestError};
use crate::chain::names::{FileKind, PointFile, PointName};
use crate::files::Shortage;
use crate::qcow2::header::Header;

impl Catalogue {
    /// Reads header and manifest of one point and compares them.
    pub(super) fn read_point(&mut self, name: PointName, files: &OfPoint) -> Point {
        let path = self.path_of(name, FileKind::Layer);
        let mut examined = Examined { path: path.clone(), problems: Vec::new(), fatal: None };
        let (layer_bytes, file_bytes) = match fs::symlink_metadata(&path) {
            Ok(metadata) => (metadata.blocks().saturating_mul(512), metadata.len()),
            Err(error) => {
                examined.fatal(Problem::Unreadable { path: path.clone(), cause: error.into() });
                (0, 0)
            }
        };
        let header = examined.header();
        let link = header.as_ref().and_then(|header| self.link(name, header, &mut examined));
        let base = link.and_then(|link| Some(self.read_base(link.base?, link.parent, &mut examined)));
        let merged = self.merged_manifest(name, files, link, &mut examined);
        let is_merged = merged.is_some();
        let digests = match is_merged && files.merged_digests {
            true => self.directory.join(self.file_of(name, FileKind::Digests).merged_name()),
            false => self.path_of(name, FileKind::Digests),
        };
        let manifest = merged.or_else(|| self.read_manifest(name, &mut examined));
        if let Some(manifest) = &manifest {
            self.check_digests_length(manifest, files, &digests, &mut examined);
        }
        if let Some(manifest) = &manifest {
            examined.compare(manifest, header.as_ref(), link, file_bytes);
        }
        let linked = link;
        let link = link.or(manifest.as_ref().map(Link::of));
        let layer_bytes = layer_bytes.saturating_add(base.as_ref().map_or(0, |base| base.layer_bytes));
        self.bases.extend(base);
        let fatal = examined.fatal.map(|index| self.problems.len() + index);
        self.problems.append(&mut examined.problems);
        Point {
            name,
            path,
            kind: link.map(|link| match link.parent {
                Some(_) => PointKind::Incremental,
                None => PointKind::Full,
            }),
            parent: link.and_then(|link| link.parent),
            base: link.and_then(|link| link.base),
            header,
            manifest,
            layer_bytes,
            file_bytes,
            digests,
            linked,
            sound: false,
            fatal,
        }
    }

    /// The layer that a point of this name has left, as a point. Its header was read before.
    fn read_base(&self, name: PointName, parent: Option<PointName>, examined: &mut Examined) -> Point {
        let path = self.base_path(name, FileKind::Layer);
        let metadata = fs::symlink_metadata(&path).ok();
        let header = Header::read(&path);
        let header = header.map_err(|cause| {
            // That it can be used was seen before.
            if Shortage::of(&cause).is_some() {
                examined.problems.push(Problem::Header { path: path.clone(), cause: cause.into() });
            }
        });
        Point {
            name,
            kind: None,
            parent,
            base: None,
            header: header.ok(),
            manifest: None,
            layer_bytes: metadata.as_ref().map_or(0, |metadata| metadata.blocks().saturating_mul(512)),
            file_bytes: metadata.map_or(0, |metadata| metadata.len()),
            digests: self.base_path(name, FileKind::Digests),
            linked: Some(Link { parent, base: None }),
            sound: false,
            fatal: None,
            path,
        }
    }

    /// The manifest that a merge has put beside the other, if the layer is that of the merge: it builds
    /// upon something else than before.
    fn merged_manifest(
        &self,
        name: PointName,
        files: &OfPoint,
        link: Option<Link>,
        examined: &mut Examined,
    ) -> Option<Manifest> {
        if !files.merged_manifest {
            return None;
        }
        let path = self.directory.join(self.file_of(name, FileKind::Manifest).merged_name());
        let manifest = match Manifest::read(&path, &self.image, name) {
            Ok(manifest) => manifest,
            Err(cause) => {
                // Whether it counts is not known then.
                if Shortage::of(&cause).is_some() {
                    examined.problems.push(Problem::Manifest { path, cause: cause.into() });
                }
                return None;
            }
        };
        (link == Some(Link::of(&manifest))).then_some(manifest)
    }

    fn read_manifest(&self, name: PointName, examined: &mut Examined) -> Option<Manifest> {
        let path = self.path_of(name, FileKind::Manifest);
        match Manifest::read(&path, &self.image, name) {
            Ok(manifest) => Some(manifest),
            Err(ManifestError::Missing) if name.is_python() => None,
            Err(cause) => {
                examined.problems.push(Problem::Manifest { path, cause: cause.into() });
                None
            }
        }
    }

    fn check_digests_length(
        &self,
        manifest: &Manifest,
        files: &OfPoint,
        path: &Path,
        examined: &mut Examined,
    ) {
        let path = path.to_owned();
        let expected = manifest.digests.bytes;
        match fs::symlink_metadata(&path) {
            // Something else of that name was reported as such.
            _ if files.digests == Presence::Other => {}
            Ok(metadata) if metadata.len() == expected => {}
            Ok(metadata) => {
                examined.problems.push(Problem::DigestsLength { path, found: metadata.len(), expected });
            }
            Err(_) => examined.problems.push(Problem::DigestsMissing { path }),
        }
    }

    /// What the layer builds upon by its header.
    fn link(&self, name: PointName, header: &Header, examined: &mut Examined) -> Option<Link> {
        let path = examined.path.clone();
        let backing = match header.chain_backing() {
            Ok(Some(backing)) => backing.to_owned(),
            Ok(None) => return Some(Link { parent: None, base: None }),
            Err(cause) => {
                examined.fatal(Problem::Header { path, cause: cause.into() });
                return None;
            }
        };
        if backing == PYTHON_ROOT && name.is_python() {
            self.check_python_root(examined);
            return Some(Link { parent: None, base: None });
        }
        let below = |file: Option<PointFile>| match file {
            Some(PointFile { image, point, kind: FileKind::Layer })
                if image == self.image && point < name =>
            {
                Some(point)
            }
            _ => None,
        };
        if let Some(base) = below(PointFile::parse_base(&backing)) {
            return self.link_through(base, examined);
        }
        let Some(parent) = below(PointFile::parse(&backing)) else {
            examined.fatal(Problem::ForeignBacking { path, backing });
            return None;
        };
        if !self.directory.join(&backing).exists() {
            examined.fatal(Problem::ParentMissing { path, parent });
        }
        Some(Link { parent: Some(parent), base: None })
    }

    /// What a layer builds upon that builds upon the base of the given name.
    fn link_through(&self, base: PointName, examined: &mut Examined) -> Option<Link> {
        let path = self.base_path(base, FileKind::Layer);
        let header =
            match Header::read(&path).and_then(|header| header.check_restore_point().map(|()| header)) {
                Ok(header) => header,
                Err(cause) => {
                    examined.fatal(Problem::Header { path, cause: cause.into() });
                    return None;
                }
            };
        let mut of_base = Examined { path, problems: Vec::new(), fatal: None };
        let link = self.link(base, &header, &mut of_base);
        if let Some(fatal) = of_base.fatal {
            examined.fatal(of_base.problems.swap_remove(fatal));
        }
        let link = link?;
        if link.base.is_some() {
            // No merge makes such a thing.
            let (path, backing) = (examined.path.clone(), self.file_of(base, FileKind::Layer).base_name());
            examined.fatal(Problem::ForeignBacking { path, backing });
            return None;
        }
        Some(Link { parent: link.parent, base: Some(base) })
    }

    /// A layer upon `empty.qcow2` is a full backup as long as that really is an empty image.
    fn check_python_root(&self, examined: &mut Examined) {
        let path = self.directory.join(PYTHON_ROOT);
        match Header::read(&path) {
            Ok(root) if root.backing.is_none() && root.check_restore_point().is_ok() => {}
            Ok(_) => {
                let path = examined.path.clone();
                examined.fatal(Problem::ForeignBacking { path, backing: PYTHON_ROOT.to_owned() });
            }
            Err(cause) => examined.fatal(Problem::Header { path, cause: cause.into() }),
        }
    }
}

/// A point under examination: its layer, and what was found out about it.
struct Examined {
    path: PathBuf,
    problems: Vec<Problem>,
    /// The first one that keeps the layer from being read.
    fatal: Option<usize>,
}

impl Examined {
    fn fatal(&mut self, problem: Problem) {
        self.fatal.get_or_insert(self.problems.len());
        self.problems.push(problem);
    }

    fn header(&mut self) -> Option<Header> {
        let path = self.path.clone();
        match Header::read(&self.path) {
            Ok(header) => {
                if let Err(cause) = header.check_restore_point() {
                    self.fatal(Problem::Header { path, cause: cause.into() });
                }
                Some(header)
            }
            Err(cause) => {
                self.fatal(Problem::Header { path, cause: cause.into() });
                None
            }
        }
    }

    /// Reports what manifest and layer do not agree about.
    fn compare(&mut self, manifest: &Manifest, header: Option<&Header>, link: Option<Link>, file_bytes: u64) {
        let mut disagree = |what, layer: String, manifest: String| {
            if layer != manifest {
                let path = self.path.clone();
                self.fatal(Problem::Disagreement { path, what, layer, manifest });
            }
        };
        let name = |parent: Option<PointName>| parent.map_or("none".to_owned(), |parent| parent.to_string());
        if let Some(link) = link {
            disagree("parent", name(link.parent), name(manifest.parent));
            disagree("base", name(link.base), name(manifest.base));
        }
        if let Some(header) = header {
            let record = &manifest.record;
            let size = record.layer_size();
            disagree("virtual size", header.virtual_size.to_string(), size.to_string());
            let clusters = header.cluster_bits.size();
            disagree("cluster size", clusters.to_string(), record.cluster_size.to_string());
            disagree("extended L2", header.extended_l2.to_string(), record.extended_l2.to_string());
        }
        if file_bytes < manifest.file_bytes {
            let (path, expected) = (self.path.clone(), manifest.file_bytes);
            self.fatal(Problem::Truncated { path, found: file_bytes, expected });
        } else {
            disagree("file length", file_bytes.to_string(), manifest.file_bytes.to_string());
        }
    }
}
