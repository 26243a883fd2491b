//! The command lines of `prune`, `hold` and `release`.

use std::path::PathBuf;

use clap::Args;
use clap::error::ErrorKind;
use rbd2qcow2_core::prune::{Limit, Policy, Within};

use super::values;

pub(super) const PRUNE_EXAMPLES: &str = "\
Examples:
  rbd2qcow2 prune /backups --keep-daily 14 --keep-weekly 8 --keep-monthly 12 --dry-run
  rbd2qcow2 prune /backups vm-1 db --keep-within 30d --keep-yearly unlimited
  rbd2qcow2 prune /backups vm-1@20261122T173312Z      this point, and no other

A point stays when any rule keeps it. Each rule goes back from the newest point and keeps the newest
of each hour, day, week (from Monday), month or year that has one, in local time (TZ), until it has
kept N; `unlimited` keeps one of each. A rule that has not kept N when it comes to the oldest point
keeps that, too. --keep-within counts back from the newest point: y, m (months), w, d, h, as in
1y6m. This is how `restic forget` counts; all chains of an image count as one.

The newest point of an image always stays, since the next backup builds upon it, and so do points
that are held (see `hold`). What a removed point held that others need is merged into the next one
that stays. The other points are what they were, bit for bit. All of it is held against its digests
before. Points of the Python rbd2qcow2 have none: of these the structure is checked, and `verify`
goes on to call what took over their data `unverifiable`.

Never prune points that anything outside of this directory builds upon: hold them. An image that is
being backed up, restored, served or verified is left for the next run, and one with a missing or
damaged file is not touched; the others are pruned, and the exit status is 1.";

pub(super) const HOLD_EXAMPLES: &str = "\
Examples:
  rbd2qcow2 hold /backups vm-1@20261122T173312Z --reason 'before the upgrade'
  rbd2qcow2 release /backups vm-1@20261122T173312Z

A point that is held is not pruned, whatever the rules say, until it is released. The reason stands
in its manifest; another `hold` puts another in its place. Points of the Python rbd2qcow2 have no
manifest and cannot be held.";

/// The arguments of `prune`.
#[derive(Debug, Args)]
pub struct PruneArgs {
    /// Directory that holds a directory for each image
    #[arg(value_name = "DEST")]
    pub dest: PathBuf,
    /// Images to apply the rules to, all when nothing is named; and single points to remove
    #[arg(value_name = "IMAGE[@POINT]", value_parser = values::non_empty)]
    pub points: Vec<String>,
    /// Tell for each point whether it would stay, and why; change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Which points stay.
    #[command(flatten)]
    rules: Rules,
}

/// Which points stay.
#[derive(Debug, Args)]
#[command(next_help_heading = "Rules (what any of them keeps stays)")]
struct Rules {
    /// Keep the N newest points
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = values::limit)]
    keep_last: Option<Limit>,
    /// Keep the newest point of each of the N newest hours that have one
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = values::limit)]
    keep_hourly: Option<Limit>,
    /// Keep the newest point of each of the N newest days that have one
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = values::limit)]
    keep_daily: Option<Limit>,
    /// Keep the newest point of each of the N newest weeks that have one
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = values::limit)]
    keep_weekly: Option<Limit>,
    /// Keep the newest point of each of the N newest months that have one
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = values::limit)]
    keep_monthly: Option<Limit>,
    /// Keep the newest point of each of the N newest years that have one
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = values::limit)]
    keep_yearly: Option<Limit>,
    /// Keep all points that are younger than this, counted back from the newest
    #[arg(long, value_name = "DURATION")]
    keep_within: Option<Within>,
}

/// The arguments of `hold`.
#[derive(Debug, Args)]
pub struct HoldArgs {
    /// Directory that holds a directory for each image
    #[arg(value_name = "DEST")]
    pub dest: PathBuf,
    /// The point to hold, as `list` shows it
    #[arg(value_name = "IMAGE@POINT", value_parser = values::with_point)]
    pub point: String,
    /// Why it must stay, for those who wonder later
    #[arg(long, value_name = "TEXT", value_parser = values::non_empty)]
    pub reason: String,
}

/// The arguments of `release`.
#[derive(Debug, Args)]
pub struct ReleaseArgs {
    /// Directory that holds a directory for each image
    #[arg(value_name = "DEST")]
    pub dest: PathBuf,
    /// The point to release
    #[arg(value_name = "IMAGE@POINT", value_parser = values::with_point)]
    pub point: String,
}

impl PruneArgs {
    /// Refuses to prune by nothing.
    pub(super) fn check(&self) -> Result<(), (ErrorKind, &'static str)> {
        if self.policy().is_none() && self.points.is_empty() {
            return Err((
                ErrorKind::MissingRequiredArgument,
                "nothing tells which points to keep: give at least one rule above 0, `--keep-daily 14` for \
                 instance, or name the points to remove",
            ));
        }
        Ok(())
    }

    /// The rules, where there are any.
    pub fn policy(&self) -> Option<Policy> {
        let Rules { keep_last, keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly, keep_within } =
            &self.rules;
        let policy = Policy {
            last: keep_last.unwrap_or_default(),
            hourly: keep_hourly.unwrap_or_default(),
            daily: keep_daily.unwrap_or_default(),
            weekly: keep_weekly.unwrap_or_default(),
            monthly: keep_monthly.unwrap_or_default(),
            yearly: keep_yearly.unwrap_or_default(),
            within: *keep_within,
        };
        (!policy.is_empty()).then_some(policy)
    }
}
