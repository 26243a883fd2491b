//! Chains of layers that different programs made: this one, stock QEMU for it, and stock QEMU for the
//! Python tool.

use super::*;
use crate::layer::native::testing::{Form, Stretch};
use crate::layer::qemu_nbd::QemuTools;
use crate::layer::qemu_nbd::testing::{Random, contents, qemu_img};
use crate::layer::{Compression, ExtendedL2};
use crate::qcow2::testing::{VARIANTS, Variant, qemu};

/// A size in bytes, and what the image holds.
type Image = (usize, Vec<(usize, Stretch)>);

/// How a point is made.
#[derive(Clone, Debug)]
enum Made {
    /// By this program.
    Ours(Form, Image),
    /// By this program with QEMU's writer: clusters of 64 KiB without subclusters.
    Qemu { packed: bool, image: Image },
    /// By the Python tool, in so many sectors.
    Python { variant: Variant, sectors: u64, seed: u64 },
}

/// What QEMU makes unless told otherwise.
const USUAL: Variant = Variant { cluster: 65536, options: "compat=1.1" };

fn made() -> impl Strategy<Value = Made> {
    let variant = prop_oneof![1 => Just(USUAL), 1 => prop::sample::select(&VARIANTS[..])];
    prop_oneof![
        2 => (form(), image()).prop_map(|(form, image)| Made::Ours(form, image)),
        1 => (any::<bool>(), image()).prop_map(|(packed, image)| Made::Qemu { packed, image }),
        2 => (variant, 1_u64..3000, 1..u64::MAX)
            .prop_map(|(variant, sectors, seed)| Made::Python { variant, sectors, seed }),
    ]
}

impl Fixture {
    fn make(&mut self, tools: &QemuTools, made: &Made) {
        let old = self.points.last().map_or(&[][..], |(_, content)| content);
        match made {
            Made::Ours(form, image) => self.back_up(form, next_content(old, image)),
            Made::Qemu { packed, image } => {
                let compression = if *packed { Compression::Zlib } else { Compression::None };
                let form = Form { cluster_bits: 16, extended_l2: ExtendedL2::Off, compression, block: 5000 };
                self.back_up_by_qemu(tools, &form, next_content(old, image));
            }
            Made::Python { variant, sectors, seed } => {
                self.back_up_by_python(tools, *variant, *sectors, &mut Random::new(*seed));
            }
        }
    }

    /// Stock QEMU reads in every point what it held, and finds nothing wrong with any file.
    fn check_by_qemu(&self, there: &[PointName]) {
        for (name, content) in self.points.iter().filter(|(name, _)| there.contains(name)) {
            let layer = format!("{}@{name}.qcow2", self.image.encoded());
            let mut wanted = content.clone();
            wanted.resize(content.len().next_multiple_of(512), 0);
            for tools in qemus() {
                assert!(contents(&tools, &self.directory(), &layer) == wanted, "{name}");
                qemu_img(&tools, &self.directory(), &["check", "-q", "-f", "qcow2", &layer]);
            }
        }
    }
}

proptest! {
    #![proptest_config(cases(12))]
    /// Whoever made the layers, of whatever form: clusters of another size, packed, with subclusters and
    /// without, of images that shrink and grow.
    #[test]
    fn whoever_made_the_layers_what_stays_reads_the_same(
        steps in prop::collection::vec(made(), 3..7),
        going in prop::collection::vec((any::<Index>(), 1_usize..3), 6)
    ) {
        let Some(tools) = qemu() else { return Ok(()) };
        let mut fixture = Fixture::empty("vm");
        for made in &steps {
            fixture.make(&tools, made);
        }
        let mut there = fixture.names();
        fixture.check_all(&there);
        for (which, count) in going {
            if there.len() < 2 {
                break;
            }
            let start = which.index(there.len() - 1);
            let end = (start + count).min(there.len() - 1);
            let gone: BTreeSet<_> = there.drain(start..end).collect();
            fixture.forget(&gone, Reuse::Never).unwrap();
            fixture.check_all(&there);
            fixture.check_by_qemu(&there);
        }
    }
}
