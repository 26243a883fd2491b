//! What the command line accepts, refuses and comes to mean.

use std::path::Path;

use rbd2qcow2_core::prune::{Limit, Policy};
use rbd2qcow2_core::rbd::Features;
use rbd2qcow2_core::restore::image::Overrides;
use rbd2qcow2_core::restore::{FileFormat, Qcow2Options};
use rbd2qcow2_core::serve::{Access, Listen, Serve, ServeOptions};

use super::values::{self, PointSpec, ValueError};
use super::*;

/// Parses a command line given as words between spaces.
fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::from_args(["rbd2qcow2"].into_iter().chain(line.split_whitespace()).map(OsString::from))
}

/// The run that a `backup` line asks for.
fn run_of(line: &str) -> PoolBackup {
    let cli = parse(line).unwrap();
    let cluster = cli.cluster();
    match cli.command {
        Command::Backup(args) => args.to_run(cluster),
        _ => panic!("not a backup: {line}"),
    }
}

/// The refusal of a line, which must be wrong usage.
fn refusal(line: &str) -> String {
    let error = parse(line).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{line}: {error}");
    error.to_string()
}

#[test]
fn clap_finds_no_contradiction() {
    Cli::command().debug_assert();
}

#[test]
fn defaults_are_those_of_the_library() {
    // The programs are named so that the environment cannot have a say.
    let run = run_of("backup rbd /backups --qemu-img qemu-img --qemu-nbd qemu-nbd");
    assert_eq!((run.pool.as_str(), run.namespace.as_str()), ("rbd", ""));
    assert_eq!(run.dest, PathBuf::from("/backups"));
    assert_eq!(run.jobs, 4);
    assert!(run.images.is_empty() && run.exclude.is_empty());
    assert_eq!(run.cluster, ClusterOptions::default());
    assert_eq!(format!("{:?}", run.options), format!("{:?}", BackupOptions::default()));
}

#[test]
fn every_option_of_backup_arrives() {
    let run = run_of(
        "backup rbd/ns /backups a b --exclude x* --exclude y* -j 2 -p 256 --writer qemu-nbd \
         --compression zstd --cluster-size 128K --no-extended-l2 --diff scan --prove 7 --when-base-is-gone compare --full --keep-snapshots 3 --rate-limit 10M \
         --dry-run --timeout 7 --qemu-img /q/img --qemu-nbd /q/nbd",
    );
    assert_eq!((run.pool.as_str(), run.namespace.as_str()), ("rbd", "ns"));
    assert_eq!((run.images, run.exclude), (vec!["a".into(), "b".into()], vec!["x*".into(), "y*".into()]));
    assert_eq!(run.jobs, 2);
    let options = run.options;
    assert_eq!(options.parallel, 256);
    assert_eq!(options.writer, Writer::QemuNbd);
    assert_eq!(options.extended_l2, ExtendedL2::Off);
    assert_eq!(options.compression, Compression::Zstd { level: None });
    assert_eq!(options.cluster_size, Some(131_072));
    assert_eq!(options.diff, DiffMode::Scan);
    assert_eq!((options.prove, options.when_base_is_gone), (7, BaseGone::Compare));
    assert!(options.full && options.dry_run);
    assert_eq!(options.keep_snapshots, 3);
    assert_eq!(options.rate_limit, Some(10 << 20));
    assert_eq!(options.patience, Duration::from_secs(7));
    assert_eq!(options.qemu_img, PathBuf::from("/q/img"));
    assert_eq!(options.qemu_nbd, PathBuf::from("/q/nbd"));
}

#[test]
fn the_native_writer_has_levels() {
    let options = run_of("backup rbd /d --writer native --compression zstd:22").options;
    assert_eq!(
        (options.writer, options.compression),
        (Writer::Native, Compression::Zstd { level: Some(22) })
    );
    assert_eq!(run_of("backup rbd /d --compression zstd:3").options.writer, Writer::Native);
}

#[test]
fn cluster_options_may_stand_on_either_side() {
    let all = "-c /x/ceph.conf -n client.b -k /x/keyring -m 10.0.0.1,10.0.0.2";
    let long = "--conf /x/ceph.conf --id b --keyring /x/keyring --mon-host 10.0.0.1,10.0.0.2";
    for line in [format!("{all} backup rbd /d"), format!("backup {long} rbd /d")] {
        let cluster = run_of(&line).cluster;
        assert_eq!(cluster.conf, Some("/x/ceph.conf".into()), "{line}");
        assert_eq!(cluster.name.as_deref(), Some("client.b"), "{line}");
        assert_eq!(cluster.keyring, Some("/x/keyring".into()), "{line}");
        assert_eq!(cluster.mon_host.as_deref(), Some("10.0.0.1,10.0.0.2"), "{line}");
    }
}

#[test]
fn conflicts_are_found_across_the_subcommand() {
    assert!(refusal("--id a --name client.b list /d").contains("--id and --name"));
    assert!(refusal("--id a list /d --name client.b").contains("--id and --name"));
    assert!(refusal("-q list /d -v").contains("--quiet and --verbose"));
}

#[test]
fn a_level_is_refused_for_its_reason() {
    let line = "backup rbd /d --writer qemu-nbd --compression zstd:3";
    assert!(refusal(line).contains("qemu-nbd cannot set a level"));
    assert!(refusal("backup rbd /d --compression zstd:23").contains("from 1 to 22"));
}

#[test]
fn wrong_usage_is_refused() {
    for line in [
        "",
        "restore /d x",
        "restore /d --to-file f",
        "restore /d @20261122T173312Z --to-file",
        "restore /d x --to-file f --format vmdk",
        "restore /d x --to-file f --compression zstd",
        "restore /d x --to-file f --cluster-size 64K",
        "restore /d x --to-file f --no-extended-l2",
        "restore /d x --to-file - --format qcow2",
        "restore /d x --to-file - --json",
        "restore /d x y --to-file f",
        "restore /d x --to-file f --to-rbd rbd/x",
        "restore /d x --to-rbd x",
        "restore /d x --to-rbd rbd/",
        "restore /d x --to-rbd rbd/a/b/c",
        "restore /d x --to-rbd rbd/x@snap",
        "restore /d x --to-rbd rbd/x --format qcow2",
        "restore /d x --to-rbd rbd/x --compression zstd",
        "restore /d x --to-rbd rbd/x --object-size 3M",
        "restore /d x --to-rbd rbd/x --object-size 2K",
        "restore /d x --to-rbd rbd/x --stripe-unit 64K",
        "restore /d x --to-rbd rbd/x --stripe-count 4",
        "restore /d x --to-rbd rbd/x --image-feature speed",
        "restore /d x --to-rbd rbd/x --image-feature migrating",
        "restore /d x --to-rbd rbd/x --metadata key",
        "restore /d x --to-rbd rbd/x --metadata =value",
        "restore /d x --to-rbd rbd/x --size 0",
        "restore /d x --to-file f --overwrite",
        "restore /d x --to-file f --object-size 4M",
        "restore /d x --to-file f --data-pool ec",
        "backup",
        "backup rbd",
        "backup / /d",
        "backup rbd/ /d",
        "backup rbd/a/b /d",
        "backup rbd /d -j 0",
        "backup rbd /d -p 0",
        "backup rbd /d -p 257",
        "backup rbd /d --keep-snapshots 0",
        "backup rbd /d --writer dd",
        "backup rbd /d --compression lz4",
        "backup rbd /d --cluster-size 3K",
        "backup rbd /d --diff quick",
        "backup rbd /d --rate-limit 0",
        "backup rbd /d --rate-limit fast",
        "backup rbd /d --timeout 0",
        "backup rbd /d --progress sometimes",
        "-n admin backup rbd /d",
        "list",
        "list /d --exclude x",
    ] {
        refusal(line);
    }
}

#[test]
fn every_option_of_restore_arrives() {
    let restore_of = |line: &str| match parse(line).unwrap().command {
        Command::Restore(args) => args,
        _ => panic!("not a restore: {line}"),
    };
    let args = restore_of("restore /b vm --to-file out");
    assert!(matches!(args.destination(), Destination::File(path) if path == Path::new("out")));
    assert_eq!(args.format(), FileFormat::Raw);
    let restore = args.to_restore();
    assert_eq!((restore.image.as_str(), restore.point), ("vm", None));
    assert_eq!(restore.dest, PathBuf::from("/b"));
    assert_eq!(restore.options.parallel, 16);
    let args = restore_of("restore /b vm --to-file - -p 3");
    assert!(matches!(args.destination(), Destination::Stdout));
    assert_eq!(args.to_restore().options.parallel, 3);
    let args = restore_of("restore /b vm --to-file ./-");
    assert!(matches!(args.destination(), Destination::File(path) if path == Path::new("./-")));
    let usual = restore_of("restore /b vm --to-file o --format qcow2").format();
    assert_eq!(usual, FileFormat::Qcow2(Qcow2Options::default()));
    let args = restore_of(
        "restore /b vm@20261122T173312Z --to-file o --format qcow2 --compression zstd:3 --cluster-size 1M \
         --no-extended-l2 --json",
    );
    let options = Qcow2Options {
        compression: Compression::Zstd { level: Some(3) },
        cluster_size: 1 << 20,
        extended_l2: ExtendedL2::Off,
    };
    assert_eq!(args.format(), FileFormat::Qcow2(options));
    assert_eq!(args.to_restore().point.unwrap().to_string(), "20261122T173312Z");
}

#[test]
fn every_option_of_restore_to_rbd_arrives() {
    let target_of = |line: &str| match parse(line).unwrap().command {
        Command::Restore(args) => match args.destination() {
            Destination::Image(spec) => args.image(spec, ClusterOptions::default()),
            other => panic!("restores to {other:?}"),
        },
        _ => panic!("not a restore: {line}"),
    };
    let usual = target_of("restore /b vm --to-rbd rbd/new");
    assert_eq!(usual.to_string(), "rbd/new");
    assert_eq!((usual.overwrite, usual.patience), (false, Duration::from_secs(300)));
    assert_eq!(usual.overrides, Overrides::default());
    let all = target_of(
        "restore /b vm --to-rbd rbd/ns/new --overwrite --size 10G --object-size 8M --stripe-unit 64K \
         --stripe-count 4 --image-feature layering,exclusive-lock --image-feature object-map --data-pool ec \
         --no-metadata --metadata a=1 --metadata b=x=y --timeout 7",
    );
    assert_eq!((all.pool.as_str(), all.namespace.as_str(), all.image.as_str()), ("rbd", "ns", "new"));
    assert_eq!((all.overwrite, all.patience), (true, Duration::from_secs(7)));
    let pair = |key: &str, value: &str| (key.as_bytes().to_vec(), value.as_bytes().to_vec());
    let overrides = Overrides {
        size: Some(10 << 30),
        object_size: Some(8 << 20),
        stripe_unit: Some(64 << 10),
        stripe_count: Some(4),
        features: Some(Features(0b1101)),
        data_pool: Some("ec".into()),
        no_metadata: true,
        metadata: [pair("a", "1"), pair("b", "x=y")].into(),
    };
    assert_eq!(all.overrides, overrides);
}

#[test]
fn points_are_told_from_names_with_an_at_sign() {
    let spec = |text: &str| {
        let spec: PointSpec = text.parse().unwrap();
        (spec.image, spec.point.map(|point| point.to_string()))
    };
    let both = |image: &str, point: &str| (image.to_owned(), Some(point.to_owned()));
    assert_eq!(spec("vm@20261122T173312Z"), both("vm", "20261122T173312Z"));
    assert_eq!(spec("vm@1700000000"), both("vm", "1700000000"));
    assert_eq!(spec("a@b@1700000000"), both("a@b", "1700000000"));
    for image in ["vm", "a@b", "vm@20261399T000000Z", "vm@", "vm@-1", "@1700000000"] {
        assert_eq!(spec(image), (image.to_owned(), None));
    }
    assert_eq!("".parse::<PointSpec>(), Err(ValueError::Empty));
}

#[test]
fn help_names_the_hazard_of_fast() {
    let mut cli = Cli::command();
    let help = cli.find_subcommand_mut("backup").unwrap().render_long_help().to_string();
    for word in ["MISSES CHANGES", "rollback", "shrunk and grown", "wrong object map", "Exit status"] {
        assert!(help.contains(word), "{word} is not in {help}");
    }
}

#[test]
fn sizes() {
    assert_eq!(values::bytes("1"), Ok(1));
    assert_eq!(values::bytes("64k"), Ok(65_536));
    assert_eq!(values::bytes("64K"), Ok(65_536));
    assert_eq!(values::bytes("2M"), Ok(2 << 20));
    assert_eq!(values::bytes("3G"), Ok(3 << 30));
    assert_eq!(values::bytes("16T"), Ok(16 << 40));
    for text in ["", "K", "-1", "+1", "1.5G", "1KB", "1 K", "0x10", "١", "1é"] {
        assert_eq!(values::bytes(text), Err(ValueError::Bytes), "{text}");
    }
    assert_eq!(values::bytes("0"), Err(ValueError::Zero));
    assert_eq!(values::bytes("99999999999999999999"), Err(ValueError::TooLarge));
    assert_eq!(values::bytes("16777216T"), Err(ValueError::TooLarge));
}

#[test]
fn cluster_sizes() {
    assert_eq!(values::cluster_size("512"), Ok(512));
    assert_eq!(values::cluster_size("64K"), Ok(65_536));
    assert_eq!(values::cluster_size("2M"), Ok(2 << 20));
    for text in ["256", "4M", "65535", "8T"] {
        assert_eq!(values::cluster_size(text), Err(ValueError::ClusterSize), "{text}");
    }
}

#[test]
fn compressions() {
    assert_eq!(values::compression("none"), Ok(Compression::None));
    assert_eq!(values::compression("zlib"), Ok(Compression::Zlib));
    assert_eq!(values::compression("zstd"), Ok(Compression::Zstd { level: None }));
    assert_eq!(values::compression("zstd:1"), Ok(Compression::Zstd { level: Some(1) }));
    assert_eq!(values::compression("zstd:22"), Ok(Compression::Zstd { level: Some(22) }));
    for text in ["zstd:0", "zstd:23", "zstd:", "zstd:x"] {
        assert_eq!(values::compression(text), Err(ValueError::Level), "{text}");
    }
    for text in ["", "zlib:3", "ZSTD", "lzo"] {
        assert_eq!(values::compression(text), Err(ValueError::Compression), "{text}");
    }
}

/// The server that a `serve` line asks for.
fn serve_of(line: &str) -> Serve {
    // The program is named so that the environment cannot have a say.
    match parse(&format!("{line} --qemu-nbd qemu-nbd")).unwrap().command {
        Command::Serve(args) => args.to_serve(),
        _ => panic!("not a serve: {line}"),
    }
}

#[test]
fn a_server_is_that_of_the_library_unless_told() {
    let serve = serve_of("serve /backups vm-1");
    let usual = ServeOptions::default();
    assert_eq!((serve.dest.as_path(), serve.image.as_str()), (Path::new("/backups"), "vm-1"));
    assert_eq!((&serve.point, &serve.options.listen), (&None, &usual.listen));
    assert_eq!((&serve.options.access, serve.options.connections), (&usual.access, usual.connections));
    assert_eq!(serve.options.qemu_nbd, usual.qemu_nbd);

    let serve = serve_of("serve /b vm-1@20261122T173312Z --socket /s --writable --connections 3");
    assert_eq!(serve.point.unwrap().to_string(), "20261122T173312Z");
    assert_eq!(serve.options.listen, Listen::Socket("/s".into()));
    assert_eq!(serve.options.access, Access::Writable { overlay_directory: None });
    assert_eq!(serve.options.connections, 3);

    let serve = serve_of("serve /b vm-1 --port 7 --writable --overlay-dir /o");
    assert_eq!(serve.options.listen, Listen::Tcp("127.0.0.1:7".parse().unwrap()));
    assert_eq!(serve.options.access, Access::Writable { overlay_directory: Some("/o".into()) });
    let serve = serve_of("serve /b vm-1 --port 0 --address ::1");
    assert_eq!(serve.options.listen, Listen::Tcp("[::1]:0".parse().unwrap()));
}

#[test]
fn every_rule_of_prune_arrives() {
    let line = "prune /d vm --keep-last 1 --keep-hourly 2 --keep-daily 3 --keep-weekly 4 --keep-monthly -1 \
                --keep-yearly unlimited --keep-within 1y6m --dry-run";
    let Ok(Cli { command: Command::Prune(args), .. }) = parse(line) else { panic!("{line}") };
    let policy = Policy {
        last: Limit::AtMost(1),
        hourly: Limit::AtMost(2),
        daily: Limit::AtMost(3),
        weekly: Limit::AtMost(4),
        monthly: Limit::All,
        yearly: Limit::All,
        within: Some("1y6m".parse().unwrap()),
    };
    assert_eq!((args.policy(), args.dry_run), (Some(policy), true));
    assert!(refusal("prune /d").contains("at least one rule"));
    assert!(refusal("prune /d --keep-daily 0").contains("at least one rule"));
    for value in ["+1", "-2", "", "all", "1.5", "4294967296"] {
        assert_eq!(values::limit(value), Err(values::ValueError::Limit), "{value}");
    }
}
