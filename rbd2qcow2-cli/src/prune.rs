//! `prune`: removes points that no rule keeps, or that were named.

use std::collections::BTreeMap;
use std::io::{self, Write};

use indicatif::{HumanBytes, ProgressBar};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use rbd2qcow2_core::chain::{self, ChainError, ImageName};
use rbd2qcow2_core::merge::MergeOptions;
use rbd2qcow2_core::prune::{Action, Decision, Plan, PlanError, PruneError, PruneImage, Wanted};
use serde::Serialize;

use crate::args::{OutputArgs, PruneArgs};
use crate::bars::Moving;
use crate::console::Console;
use crate::human::{self, count};
use crate::json::JsonLines;
use crate::outcome::{CommandError, Outcome};
use crate::points::{self, NotFound};
use crate::{names, signals};

mod watch;

use watch::Watch;

/// Why an image was not pruned. The others are.
#[derive(Debug, thiserror::Error)]
enum ImageError {
    /// There is no such image, or what stands behind its name is no point.
    #[error(transparent)]
    NotFound(#[from] NotFound),
    /// The image has no such point.
    #[error("{error}{hint}")]
    UnknownPoint {
        /// Which one. Has no cause.
        error: Box<PlanError>,
        /// What may have been meant.
        hint: String,
    },
    /// Somebody else uses the chain.
    #[error("image {image:?} is left for the next run")]
    InUse {
        /// The image.
        image: String,
        /// Who does.
        #[source]
        cause: Box<ChainError>,
    },
    /// The library could not prune the image.
    #[error("cannot prune image {image:?}")]
    Prune {
        /// The image.
        image: String,
        /// Why not.
        #[source]
        cause: Box<PruneError>,
    },
}

/// One object of `prune --json`: the keys and their order are a contract with other programs.
#[derive(Debug, Serialize)]
struct Line<'a> {
    image: &'a str,
    point: String,
    action: &'a str,
    reason: String,
    merged_into: Option<String>,
}

/// What was done, or would be, with all images together.
#[derive(Debug, Default)]
struct Totals {
    kept: usize,
    removed: usize,
    freed_at_least: u64,
    freed_at_most: u64,
}

/// Prunes images until all are done or a signal comes.
///
/// # Errors
/// The directory could not be read, the names and rules do not go together, or standard output failed.
pub fn run(args: &PruneArgs, output: &OutputArgs, console: &Console) -> Result<Outcome, CommandError> {
    let cancel = signals::stop().map_err(CommandError::Signals)?;
    let found = chain::images_in(&args.dest).map_err(CommandError::Destination)?;
    let (wanted, failures) = select(args, &found.images)?;
    if found.images.is_empty() {
        console.line(&format!("warning: nothing to prune: {}", points::nothing_in(&args.dest, &found)));
    }
    let mut failures: Vec<_> = failures.into_iter().map(ImageError::from).collect();
    let (zone, now) = (local_zone(), Timestamp::now());
    let mut totals = Totals::default();
    for (image, wanted) in &wanted {
        let (dest, zone, cancel) = (&args.dest, &zone, &cancel);
        let options = &MergeOptions::default();
        let prune = PruneImage { dest, image, wanted, zone, now, options, observer: &(), cancel };
        let result = match (cancel.is_set(), args.dry_run) {
            (true, _) => Err(PruneError::Cancelled),
            (false, true) => prune.plan(),
            (false, false) => run_watched(&prune, &Watch::new(console, output, image))?,
        };
        let plan = match result {
            Ok(plan) => plan,
            Err(PruneError::Cancelled) => {
                console.line("interrupted; the next run goes on");
                return Ok(Outcome::Interrupted);
            }
            Err(error) => {
                failures.push(explain(image, error));
                continue;
            }
        };
        totals.add(&plan);
        match console.apart(|| tell(image, &plan, args, output)) {
            // The reader has seen enough, as `head` has.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            result => result.map_err(CommandError::Output)?,
        }
    }
    for failure in &failures {
        console.line(&format!("error: {}", human::causes_block(failure)));
    }
    if !output.quiet {
        console.line(&totals.told(args.dry_run));
    }
    Ok(if failures.is_empty() { Outcome::Done } else { Outcome::Failed })
}

/// Prunes an image while people see how far that is.
///
/// # Errors
/// No thread could be made. Whatever is wrong with the image is in the inner result.
fn run_watched(prune: &PruneImage<'_>, watch: &Watch<'_>) -> Result<Result<Plan, PruneError>, CommandError> {
    std::thread::scope(|scope| {
        let tick = |bar: &ProgressBar| watch.tick(bar);
        let _bar = Moving::start(watch.bar(), scope, tick).map_err(CommandError::Threads)?;
        Ok(PruneImage { observer: watch, ..*prune }.run())
    })
}

/// What is to go of each image, and which names mean nothing.
fn select(
    args: &PruneArgs,
    there: &[ImageName],
) -> Result<(BTreeMap<ImageName, Wanted>, Vec<NotFound>), CommandError> {
    let policy = args.policy();
    if args.points.is_empty() {
        let all =
            there.iter().map(|image| (image.clone(), Wanted { policy: policy.clone(), ..Wanted::default() }));
        return Ok((all.collect(), Vec::new()));
    }
    let (found, failures) = points::select(&args.dest, &args.points, there);
    if policy.is_none()
        && let Some((image, _)) = found.iter().find(|(_, named)| named.whole)
    {
        return Err(CommandError::NoRule { image: image.clone() });
    }
    if policy.is_some() && failures.is_empty() && found.values().all(|named| !named.whole) {
        return Err(CommandError::RulesForPoints);
    }
    let wanted = found.into_iter().map(|(image, named)| {
        let policy = policy.clone().filter(|_| named.whole);
        (image, Wanted { policy, points: named.points })
    });
    Ok((wanted.collect(), failures))
}

/// The time zone whose days and weeks people mean here.
fn local_zone() -> TimeZone {
    TimeZone::try_system().unwrap_or_else(|error| {
        log::warn!("the local time zone is not known ({error}); the rules go by UTC");
        TimeZone::UTC
    })
}

/// What to tell about an image that was not pruned.
fn explain(image: &ImageName, error: PruneError) -> ImageError {
    let image = image.as_str().to_owned();
    match error {
        PruneError::Chain(cause @ ChainError::Locked { .. }) => {
            ImageError::InUse { image, cause: cause.into() }
        }
        PruneError::Plan(error @ PlanError::UnknownPoint { .. }) => {
            let PlanError::UnknownPoint { point, known, .. } = &error else { unreachable!("just matched") };
            let hint = names::nearest_point(*point, known);
            ImageError::UnknownPoint { error: error.into(), hint }
        }
        cause => ImageError::Prune { image, cause: cause.into() },
    }
}

/// Tells about the points of an image on standard output.
fn tell(image: &ImageName, plan: &Plan, args: &PruneArgs, output: &OutputArgs) -> io::Result<()> {
    let stdout = io::stdout().lock();
    if output.json {
        let mut lines = JsonLines::new(stdout);
        return plan.decisions.iter().try_for_each(|decision| lines.write(&Line::new(image, decision)));
    }
    if output.quiet {
        return Ok(());
    }
    let mut stdout = stdout;
    for decision in &plan.decisions {
        writeln!(stdout, "{}", told(image, decision, args.dry_run))?;
    }
    stdout.flush()
}

impl<'a> Line<'a> {
    fn new(image: &'a ImageName, decision: &Decision) -> Self {
        let (action, merged_into) = match &decision.action {
            Action::Keep => ("keep", None),
            Action::Remove { merged_into } => ("remove", merged_into.first()),
        };
        Self {
            image: image.as_str(),
            point: decision.point.to_string(),
            action,
            reason: reasons(decision),
            merged_into: merged_into.map(ToString::to_string),
        }
    }
}

fn reasons(decision: &Decision) -> String {
    let reasons: Vec<_> = decision.reasons.iter().map(ToString::to_string).collect();
    reasons.join(", ")
}

/// The line about a point for people.
fn told(image: &ImageName, decision: &Decision, dry_run: bool) -> String {
    let action = match (&decision.action, dry_run) {
        (Action::Keep, true) => "keep",
        (Action::Keep, false) => "kept",
        (Action::Remove { .. }, true) => "remove",
        (Action::Remove { .. }, false) => "removed",
    };
    let into = match &decision.action {
        Action::Remove { merged_into } if !merged_into.is_empty() => {
            let into: Vec<_> = merged_into.iter().map(ToString::to_string).collect();
            format!(", merged into {}", into.join(" and "))
        }
        _ => String::new(),
    };
    let (image, reasons) = (human::name(image.as_str()), human::name(&reasons(decision)));
    format!("{image}@{}: {action}{into} ({reasons})", decision.point)
}

impl Totals {
    fn add(&mut self, plan: &Plan) {
        self.kept += plan.decisions.len() - plan.removed();
        self.removed += plan.removed();
        self.freed_at_least = self.freed_at_least.saturating_add(plan.freed_at_least);
        self.freed_at_most = self.freed_at_most.saturating_add(plan.freed_at_most);
    }

    fn told(&self, dry_run: bool) -> String {
        let (least, most) = (HumanBytes(self.freed_at_least), HumanBytes(self.freed_at_most));
        let freed = if self.freed_at_least == self.freed_at_most {
            most.to_string()
        } else {
            format!("{least} to {most}")
        };
        let (would, be) = if dry_run { (" would stay", " would be") } else { (" kept", "") };
        format!("{}{would}, {}{be} removed, {freed}{be} freed", count(self.kept, "point"), self.removed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rbd2qcow2_core::chain::PointName;
    use rbd2qcow2_core::prune::{Reason, Rule};

    fn point(text: &str) -> PointName {
        PointName::parse(text).unwrap()
    }

    fn decision(action: Action, reasons: &[Reason]) -> Decision {
        Decision { point: point("20261122T173312Z"), action, reasons: reasons.to_vec() }
    }

    #[test]
    fn a_line_has_all_keys_in_order() {
        let image = ImageName::new("vm \"1\"").unwrap();
        let json = |decision| serde_json::to_string(&Line::new(&image, &decision)).unwrap();
        let period = Reason::Period { rule: Rule::Daily, period: "2026-11-22".to_owned() };
        assert_eq!(
            json(decision(Action::Keep, &[Reason::Newest, period])),
            concat!(
                r#"{"image":"vm \"1\"","point":"20261122T173312Z","action":"keep","#,
                r#""reason":"newest, daily 2026-11-22","merged_into":null}"#
            )
        );
        let merged_into = vec![point("20261123T173312Z"), point("20261124T173312Z")];
        let line = json(decision(Action::Remove { merged_into }, &[Reason::NoRule]));
        let end = r#""action":"remove","reason":"no rule keeps it","merged_into":"20261123T173312Z"}"#;
        assert!(line.ends_with(end), "{line}");
    }

    #[test]
    fn people_are_told_in_a_line() {
        let image = ImageName::new("vm\n1").unwrap();
        let held = Reason::Held { reason: "a\n\u{1b}[2J".to_owned() };
        assert_eq!(
            told(&image, &decision(Action::Keep, &[held]), true),
            "vm\\n1@20261122T173312Z: keep (held: a\\n\\u{1b}[2J)"
        );
        let merged_into = vec![point("20261123T173312Z"), point("20261124T173312Z")];
        assert_eq!(
            told(&image, &decision(Action::Remove { merged_into }, &[Reason::Named]), false),
            "vm\\n1@20261122T173312Z: removed, merged into 20261123T173312Z and 20261124T173312Z (named)"
        );
        let totals = Totals { kept: 1, removed: 2, freed_at_least: 0, freed_at_most: 2048 };
        assert_eq!(
            totals.told(true),
            "1 point would stay, 2 would be removed, 0 B to 2.00 KiB would be freed"
        );
        assert_eq!(totals.told(false), "1 point kept, 2 removed, 0 B to 2.00 KiB freed");
    }
}
