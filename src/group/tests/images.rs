//! What no image goes past, and which images a restart finds.

use std::sync::Mutex;

use super::*;
use crate::extent_map::Freed;
use crate::group::room::FoldFailure;
use crate::io::Fault;
use crate::log::control::Consistency;
use crate::log::record::{Kind, flags, payload_crcs};
use crate::log::writer::{Draft, Stamp};

/// Appends a control record of a later version, that must be understood.
pub(super) fn append_unknown(group: &Group) {
    let body = b"{}";
    let draft = Draft {
        kind: Kind::Control,
        flags: flags::MUST_UNDERSTAND | flags::LAST_OF_REQUEST,
        volume: VolumeNumber(0),
        control_kind: 999,
        offset: 0,
        length: 0,
        payload: body,
        crcs: payload_crcs(0, body),
    };
    let mut core = group.lock();
    let stamp = Stamp { epoch: core.epoch, time: core.clock.last(), durable: core.durable };
    let headers = core.writer.append(vec![draft], stamp).unwrap();
    let mut freed: Vec<Freed> = Vec::new();
    for header in &headers {
        core.apply(header, body, &mut freed);
    }
}

#[test]
fn no_point_goes_past_a_record_that_must_be_understood() {
    let bench = Bench::new("a", 1);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    write(&group, volume.number, 0, &[1; 4096]);
    group.create_bookmark(name("before"), Consistency::Crash).unwrap();
    let barrier = group.positions().head;
    bench.pass(10);
    append_unknown(&group);
    let behind = write(&group, volume.number, 0, &[2; 4096]);
    bench.pass(10);
    group.create_bookmark(name("after"), Consistency::Crash).unwrap();
    let time = group.positions().time;
    for point in [
        Point::Lsn(behind),
        Point::Time(time),
        Point::Bookmark(name("after")),
        Point::Now,
        Point::Lsn(group.positions().request_end),
    ] {
        let refused = group.open_image(&point, None, "test", None).map(|image| image.position());
        let text = refused.unwrap_err().to_string();
        assert!(text.contains("must be understood"), "{point:?}: {text}");
    }
    for point in [Point::Lsn(barrier), Point::Bookmark(name("before"))] {
        let image = group.open_image(&point, None, "test", None).unwrap();
        assert_eq!(read(&*image, volume.number, 0, 4096), [1; 4096], "{point:?}");
    }
}

#[test]
fn a_full_log_that_cannot_be_folded_refuses_writers_and_says_why() {
    let bench = Bench::new("a", 2);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    set_policy(&group, 3600, 4 * SEGMENT);
    append_unknown(&group);
    for round in 0..20 {
        write(&group, volume.number, 0, &[round; 16384]);
    }
    group.sync_now().unwrap();
    let mut told = String::new();
    for _ in 0..4 {
        if let Err(error) = group.fold(false) {
            told = error.to_string();
        }
    }
    assert!(told.contains("must be understood"), "{told}");
    let failure = FoldFailure { reason: told, since: LogTime(0), waits: false };
    group.lock().room.fold_failure = Some(failure);
    assert!(group.log_full().unwrap().reason.contains("must be understood"));
}

#[test]
fn an_image_that_the_next_start_would_not_know_of_is_not_opened() {
    let bench = Bench::new("a", 3);
    let group = bench.create();
    group.create_volume(name("v"), 1 << 20).unwrap();
    group.open_image(&Point::Now, Some(name("kept")), "test", None).unwrap();
    bench.disk.inject(Fault::Error { operation: bench.disk.operations() });
    assert!(group.open_image(&Point::Now, Some(name("lost")), "test", None).is_err());
    assert!(group.image(&name("lost")).is_none(), "its hold would be nobody's");
    group.open_image(&Point::Now, Some(name("lost")), "test", None).unwrap();
    group.close_image(&name("lost")).unwrap();
    group.close().unwrap();
    for _ in 0..2 {
        let refused = group.open_image(&Point::Now, Some(name("late")), "test", None).map(|_| ());
        assert!(refused.unwrap_err().to_string().contains("closed"));
        assert!(group.close_image(&name("kept")).is_err());
    }
    drop(group);
    let (group, _) = bench.open();
    let names: Vec<Name> = group.images().iter().map(|image| image.name().clone()).collect();
    assert_eq!(names, [name("kept")], "what was open is open again");
}

#[test]
fn a_list_of_images_that_cannot_be_read_is_told() {
    let bench = Bench::new("a", 4);
    let group = bench.create();
    group.create_volume(name("v"), 1 << 20).unwrap();
    group.open_image(&Point::Now, None, "test", None).unwrap();
    group.close().unwrap();
    drop(group);
    bench.disk.damage(&dir().join("images"), 0, 1, 0xff);
    let (group, _) = bench.open();
    assert!(group.images().is_empty());
    assert!(bench.event_codes().contains(&"image-lost".to_owned()));
}

#[test]
fn a_moment_whose_image_is_forgotten_is_shown_as_it_was_or_not_at_all_after_more_folds() {
    let bench = Bench::new("a", 4);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap().number;
    set_policy(&group, 0, 64 << 20);
    let change = |group: &Group, fill: u8| {
        write(group, volume, 0, &[fill; 16384]);
        write(group, volume, u64::from(fill) * 65536, &[fill; 16384]);
        bench.pass(5);
        group.sync_now().unwrap();
    };
    change(&group, 1);
    let image = group.open_image(&Point::Now, Some(name("i")), "test", None).unwrap();
    let (lsn, was) = (image.position().lsn, read(&*image, volume, 0, 1 << 20));
    change(&group, 2);
    group.fold_now().unwrap();
    assert!(read(&*image, volume, 0, 1 << 20) == was);
    group.close().unwrap();
    drop((image, group));
    bench.disk.damage(&dir().join("images"), 0, 1, 0xff);
    let (group, _) = bench.open();
    // What is forgotten may be needed, and nobody lets it go before that is known.
    for fill in 3..6 {
        change(&group, fill);
        group.fold_now().unwrap();
        let image = group.open_image(&Point::Lsn(lsn), Some(name("j")), "test", None).unwrap();
        assert!(read(&*image, volume, 0, 1 << 20) == was, "{fill}");
        group.close_image(&name("j")).unwrap();
    }
    group.close().unwrap();
}

#[test]
fn a_moment_that_loses_its_last_image_before_a_fold_is_not_opened_behind_it() {
    let bench = Bench::new("a", 4);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap().number;
    set_policy(&group, 0, 64 << 20);
    write(&group, volume, 0, &[1; 16384]);
    let lsn = group.open_image(&Point::Now, Some(name("i")), "test", None).unwrap().position().lsn;
    write(&group, volume, 0, &[2; 16384]);
    bench.pass(5);
    group.sync_now().unwrap();
    group.fold_now().unwrap();
    write(&group, volume, 0, &[3; 16384]);
    // A fold is about to begin: it has looked for what nobody needs.
    let fold = group.fold_lock.lock().unwrap();
    group.close_image(&name("i")).unwrap();
    assert!(group.is_kept(lsn), "until the fold passes it");
    let claimed = group.claim(group.positions().head, false).unwrap();
    assert!(claimed.is_empty(), "nothing is kept of it");
    let refused = group.open_image(&Point::Lsn(lsn), Some(name("j")), "test", None).map(|_| ());
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("nobody needed it any more"), "{refused}");
    drop(fold);
}

/// What the file says of the images that are open, and a file that says it.
fn kept_images(bench: &Bench) -> Vec<u8> {
    super::super::files::load(&*bench.disk, &dir().join("images")).unwrap()
}

fn keep_again(bench: &Bench, text: &[u8]) {
    super::super::files::store(&*bench.disk, &dir().join("images"), text).unwrap();
}

#[test]
fn an_image_whose_moment_was_lost_does_not_come_back_as_another() {
    let bench = Bench::new("a", 5);
    bench.clock.set_boot(1);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap().number;
    let kept = group.sync_now().unwrap();
    write(&group, volume, 0, &[5; 4096]);
    let image = group.open_image(&Point::Now, Some(name("late")), "test", None).unwrap();
    let lost = image.position().lsn;
    drop((image, group));
    let text = kept_images(&bench);
    let after = (0..100).map(|seed| bench.after_crash(seed)).find(|after| {
        after.clock.set_boot(2);
        after.open().1.cut.is_some_and(|(from, _)| from == kept)
    });
    let after = after.expect("one crash takes the write");
    assert!(after.event_codes().contains(&"image-lost".to_owned()));
    assert_eq!(kept_images(&after), b"[]", "what is lost stays lost");
    // Another history grows over the place, with one request of four records there.
    let (group, _) = after.open();
    let begin = group.positions().head;
    let end = write(&group, volume, 0, &[7; 60_000]);
    assert!(begin < lost && lost < end, "{begin} {lost} {end}");
    group.close().unwrap();
    drop(group);
    // As if the node had stopped before it wrote down that the image is lost.
    keep_again(&after, &text);
    let (group, _) = after.open();
    assert!(group.images().is_empty(), "it would show half a request");
    group.close().unwrap();
}

#[test]
fn an_image_is_opened_again_only_in_the_epoch_that_it_was_opened_in() {
    let bench = Bench::new("a", 6);
    let group = bench.create();
    group.create_volume(name("v"), 1 << 20).unwrap();
    let image = group.open_image(&Point::Now, Some(name("late")), "test", None).unwrap();
    let epoch = image.position().epoch.to_string();
    group.close().unwrap();
    drop((image, group));
    let text = String::from_utf8(kept_images(&bench)).unwrap();
    assert!(text.contains(&epoch), "{text}");
    keep_again(&bench, text.replace(&epoch, "00000000000000aa").as_bytes());
    assert!(bench.open().0.images().is_empty());
    assert!(bench.event_codes().contains(&"image-lost".to_owned()));
    keep_again(&bench, text.as_bytes());
    assert_eq!(bench.open().0.images().len(), 1);
}

#[test]
fn an_image_whose_time_is_over_is_closed_by_itself_also_by_the_next_start() {
    let bench = Bench::new("a", 32);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap().number;
    write(&group, volume, 0, &[1; 4096]);
    let open = |text: &str, seconds: Option<u64>| {
        let expires = seconds.map(Duration::from_secs);
        group.open_image(&Point::Now, Some(name(text)), "test", expires).unwrap()
    };
    let short = open("short", Some(60));
    open("long", Some(600));
    open("lasting", None);
    let look = |group: &Group| group.fold_round(&mut None);
    let shown = |group: &Group| -> Vec<String> {
        group.images().iter().map(|image| image.name().to_string()).collect()
    };
    bench.pass(59);
    look(&group);
    assert_eq!(shown(&group), ["lasting", "long", "short"]);
    assert_eq!(bench.event_codes().iter().filter(|code| *code == "image-expired").count(), 0);
    bench.pass(1);
    look(&group);
    assert_eq!(shown(&group), ["lasting", "long"]);
    let told = bench.events.since(0).into_iter().find(|event| event.code == "image-expired");
    assert!(told.unwrap().text.contains("image short of test"));
    group.close_this_image(&short).unwrap_err();
    group.close().unwrap();
    drop((short, group));
    bench.pass(600);
    let (group, _) = bench.open();
    look(&group);
    assert_eq!(shown(&group), ["lasting"]);
    assert_eq!(bench.event_codes().iter().filter(|code| *code == "image-expired").count(), 2);
}

/// A backup that hung past its image's expiry closed, at its end, the image of the next backup.
#[test]
fn who_closes_an_image_late_does_not_close_another_that_has_its_name() {
    let bench = Bench::new("a", 31);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    write(&group, volume.number, 0, &[1; 4096]);
    let first = group.open_image(&Point::Now, None, "test", None).unwrap();
    group.close_image(first.name()).unwrap();
    let second = group.open_image(&Point::Now, None, "test", None).unwrap();
    assert_eq!(first.name(), second.name());
    group.close_this_image(&first).unwrap_err();
    assert_eq!(read(&*second, volume.number, 0, 4096), [1; 4096]);
    group.close_this_image(&second).unwrap();
    assert!(group.images().is_empty());
}

/// A clock that lets something happen when it is looked at, once.
struct HookClock {
    clock: Arc<ManualClock>,
    hook: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Clock for HookClock {
    fn wall(&self) -> LogTime {
        let hook = self.hook.lock().unwrap().take();
        if let Some(hook) = hook {
            hook();
        }
        self.clock.wall()
    }

    fn monotonic(&self) -> Duration {
        self.clock.monotonic()
    }

    fn boot(&self) -> Option<u64> {
        self.clock.boot()
    }
}

/// The first record cannot be read any more: whatever replays the log fails.
#[test]
fn an_image_of_now_replays_nothing_whatever_is_written_meanwhile() {
    let bench = Bench::new("a", 60);
    let clock = Arc::new(HookClock { clock: bench.clock.clone(), hook: Mutex::default() });
    let mut context = bench.context();
    context.env.clock = clock.clone();
    let new = NewGroup { id: GROUP, name: name("g"), segment_bytes: SEGMENT };
    let group = Group::create(context, &dir(), new).unwrap();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap().number;
    set_policy(&group, 3600, 64 << 20);
    let path = dir().join("log").join(crate::log::segment::segment_name(0));
    let before = write(&group, volume, 0, &[1; 4096]);
    write(&group, volume, 0, &[2; 4096]);
    bench.disk.inject(crate::io::Fault::Unreadable { path, offset: 0, length: 8 });
    let replayed = group.open_image(&Point::Lsn(before), None, "test", None);
    assert!(replayed.is_err(), "it is replayed, and that fails");
    let writer = group.clone();
    *clock.hook.lock().unwrap() = Some(Box::new(move || {
        write(&writer, volume, 0, &[3; 4096]);
    }));
    let image = group.open_image(&Point::Now, None, "test", None).unwrap();
    assert!(clock.hook.lock().unwrap().is_none(), "it was written meanwhile");
    assert_eq!(read(&*image, volume, 0, 4096), [2; 4096]);
    assert_eq!(read(&*group, volume, 0, 4096), [3; 4096]);
    assert!(image.position().lsn < group.positions().head);
}
