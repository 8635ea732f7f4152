//! Whether what a server offers may take the place of what a device shows, and whether a link that
//! lives is left for it: pure.

use tidelog::nbd::{Identity, Negotiated, wire::export_flag};

/// What a device shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Bytes of the device.
    pub size_bytes: u64,
    /// The flags that the kernel was given.
    pub flags: u16,
    /// What the volume is; `None` for a server of another make.
    pub identity: Option<Identity>,
}

impl Known {
    /// What a server offers, as it is shown from now on.
    pub fn of(offer: &Negotiated) -> Known {
        Known {
            size_bytes: offer.size_bytes,
            flags: offer.flags,
            identity: Identity::parse(&offer.description),
        }
    }
}

/// What may be done with an offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the same volume, and nothing that was answered is missing.
    Same,
    /// It is the same volume under a later reign, which may lack what the one before answered; the
    /// text says so.
    LaterReign(String),
    /// It must not be shown; why.
    Other(String),
}

/// The flags that change what the kernel sends.
const FLAGS: u16 = export_flag::READ_ONLY
    | export_flag::SEND_FLUSH
    | export_flag::SEND_FUA
    | export_flag::SEND_TRIM;

/// Judges an offer.
pub fn judge(known: &Known, offer: &Known) -> Verdict {
    let other = |what: String| Verdict::Other(what);
    if offer.size_bytes < known.size_bytes {
        return other(format!(
            "it is smaller: {} bytes where the device has {}",
            offer.size_bytes, known.size_bytes
        ));
    }
    if offer.flags & FLAGS != known.flags & FLAGS {
        let (offered, had) = (offer.flags, known.flags);
        return other(format!("its flags are {offered:#x} where the device has {had:#x}"));
    }
    match (&known.identity, &offer.identity) {
        (None, None) => {
            if offer.size_bytes == known.size_bytes {
                Verdict::Same
            } else {
                other("its size differs, and nothing says that it is the same volume".to_owned())
            }
        }
        (Some(had), Some(offered)) if had.is_same_volume(offered) => judge_reign(had, offered),
        (_, Some(offered)) => other(format!("it is another volume ({offered})")),
        (Some(_), None) => other("it does not say which volume it is".to_owned()),
    }
}

fn judge_reign(had: &Identity, offered: &Identity) -> Verdict {
    // An image changes neither with the reigns nor with rewinds and restores.
    if had.lsn.is_some() {
        return Verdict::Same;
    }
    if had.rewound != offered.rewound {
        return Verdict::Other(
            "its group was taken back to an earlier moment meanwhile, or is of before that: what \
             the device has shown is not there any more; unmount, `tidelog detach`, attach anew"
                .to_owned(),
        );
    }
    if had.restored != offered.restored {
        return Verdict::Other(
            "a restore has replaced what it holds meanwhile, or it is of before that: what the \
             device has shown is not there any more; unmount, `tidelog detach`, attach anew"
                .to_owned(),
        );
    }
    if had.reign_id == offered.reign_id {
        return Verdict::Same;
    }
    if offered.reign <= had.reign {
        return Verdict::Other(format!(
            "it is of reign {} ({}) where the device has seen reign {} ({}): an older history, or \
             one that parted",
            offered.reign, offered.reign_id, had.reign, had.reign_id
        ));
    }
    match offered.before.iter().position(|(_, id)| *id == had.reign_id) {
        Some(between) if between < offered.planned => Verdict::Same,
        // The reigns before that are told follow each other without a gap.
        None if offered.before.iter().any(|(reign, _)| *reign <= had.reign) => {
            Verdict::Other(format!(
                "its reign {} ({}) does not go on from reign {} ({}), which the device has seen: a \
                 history that parted",
                offered.reign, offered.reign_id, had.reign, had.reign_id
            ))
        }
        _ => Verdict::LaterReign(format!(
            "reign {} began by {}; what reign {} had answered and not replicated or flushed may be \
             missing in it",
            offered.reign, offered.reason, had.reign
        )),
    }
}

/// Whether a server is under another reign than the one that a link to it was made under: what it
/// answers on that link is of the later one.
pub fn has_begun_anew(known: &Known, offer: &Known) -> bool {
    match (&known.identity, &offer.identity) {
        (Some(had), Some(offered)) => {
            had.is_same_volume(offered) && had.lsn.is_none() && had.reign_id != offered.reign_id
        }
        _ => false,
    }
}

/// Whether a link that lives is left for another server, by how what that offers is judged. The
/// link's own server did not offer the volume when it was asked: `refused`, where it said so. A
/// question without an answer is no reason to lose what the link still answers.
pub fn may_leave(refused: bool, there: &Verdict) -> bool {
    match there {
        Verdict::Same => true,
        Verdict::LaterReign(_) => refused,
        Verdict::Other(_) => false,
    }
}

/// What is done about a volume's size while a link lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Growth {
    /// Nothing.
    None,
    /// The link's session refuses what lies behind the size that it was made with: a new one.
    Connect,
    /// The link serves more than the device shows, which is told to the kernel later.
    Wait,
    /// It is told now.
    Show,
}

/// Judges bytes: those that the device shows, that its link serves, that the server has by now.
///
/// The kernel lets all requests come to their end before it changes the size (since Linux 6.9), and
/// takes no other socket meanwhile. So it is told on a link that works, and not before that is
/// `settled`: what was under way when it was handed over has been sent again on it.
pub fn growth(shown: u64, served: u64, offered: u64, settled: bool) -> Growth {
    match (served > shown, settled) {
        _ if offered > served => Growth::Connect,
        (true, true) => Growth::Show,
        (true, false) => Growth::Wait,
        (false, _) => Growth::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_living_link_is_left_for_the_same_alone_unless_its_server_refuses() {
        let later = Verdict::LaterReign("may lack something".to_owned());
        let other = Verdict::Other("another".to_owned());
        for refused in [false, true] {
            assert!(may_leave(refused, &Verdict::Same));
            assert_eq!(may_leave(refused, &later), refused);
            assert!(!may_leave(refused, &other));
        }
    }

    #[test]
    fn a_link_made_under_a_reign_that_its_server_has_ended_is_not_kept() {
        let had = known(4096, Some((2, "x")));
        assert!(!has_begun_anew(&had, &had));
        let mut later = offered(&[(2, "x"), (3, "y")], 1);
        assert!(has_begun_anew(&had, &later));
        assert!(!has_begun_anew(&had, &known(4096, None)), "nothing is known of it");
        later.identity.as_mut().unwrap().volume_number = 2;
        assert!(!has_begun_anew(&had, &later), "another volume");
        let mut images = [had, offered(&[(2, "x"), (3, "y")], 1)];
        for image in &mut images {
            image.identity.as_mut().unwrap().lsn = Some(4096);
        }
        assert!(!has_begun_anew(&images[0], &images[1]), "an image stays what it is");
    }

    #[test]
    fn a_larger_size_is_told_only_on_a_link_that_serves_it_and_has_settled() {
        for settled in [false, true] {
            assert_eq!(growth(4096, 4096, 4096, settled), Growth::None);
            assert_eq!(growth(4096, 4096, 8192, settled), Growth::Connect);
            assert_eq!(growth(4096, 8192, 9216, settled), Growth::Connect, "it grew once more");
            assert_eq!(growth(4096, 4096, 2048, settled), Growth::None);
        }
        assert_eq!(growth(4096, 8192, 8192, false), Growth::Wait);
        assert_eq!(growth(4096, 8192, 8192, true), Growth::Show);
    }

    fn known(size_bytes: u64, reign: Option<(u64, &str)>) -> Known {
        let identity = reign.map(|(reign, id)| Identity {
            group_id: "a1".to_owned(),
            volume_number: 1,
            reign,
            reign_id: id.to_owned(),
            reason: "test".to_owned(),
            planned: 0,
            before: Vec::new(),
            rewound: None,
            restored: None,
            lsn: None,
        });
        Known { size_bytes, flags: 0x36d, identity }
    }

    /// An offer of the last of these reigns, oldest first; the last `planned` of them lost nothing.
    fn offered(reigns: &[(u64, &str)], planned: usize) -> Known {
        let (last, before) = reigns.split_last().unwrap();
        let mut offer = known(4096, Some(*last));
        let identity = offer.identity.as_mut().unwrap();
        identity.reason = if planned > 0 { "switchover" } else { "recovery" }.to_owned();
        identity.planned = planned;
        identity.before = before.iter().rev().map(|(n, id)| (*n, (*id).to_owned())).collect();
        offer
    }

    #[test]
    fn the_same_volume_goes_on_and_a_larger_one_too() {
        let had = known(4096, Some((2, "x")));
        assert_eq!(judge(&had, &had), Verdict::Same);
        assert_eq!(judge(&had, &known(8192, Some((2, "x")))), Verdict::Same);
        let foreign = known(4096, None);
        assert_eq!(judge(&foreign, &foreign), Verdict::Same);
    }

    #[test]
    fn a_handed_over_reign_goes_on_and_a_promoted_one_is_told() {
        let had = known(4096, Some((2, "x")));
        let once = [(1, "w"), (2, "x"), (3, "y")];
        let twice = [(1, "w"), (2, "x"), (3, "y"), (5, "z")];
        for (reigns, planned) in [(&once[..], 1), (&once, 2), (&once[1..], 1), (&twice, 2)] {
            assert_eq!(judge(&had, &offered(reigns, planned)), Verdict::Same, "{reigns:?}");
        }
        for (reigns, planned) in [(&once[..], 0), (&twice, 1), (&twice, 0)] {
            let verdict = judge(&had, &offered(reigns, planned));
            assert!(matches!(verdict, Verdict::LaterReign(_)), "{reigns:?}: {verdict:?}");
        }
    }

    /// A host that was away so long, or whose server tells nothing of the reigns before.
    #[test]
    fn a_reign_that_may_have_gone_on_from_the_one_before_is_told() {
        let had = known(4096, Some((2, "x")));
        for offer in [offered(&[(3, "y")], 1), offered(&[(4, "y"), (5, "z")], 2)] {
            let verdict = judge(&had, &offer);
            assert!(matches!(verdict, Verdict::LaterReign(_)), "{offer:?}: {verdict:?}");
        }
    }

    /// A began reign 5 after a power loss while B was promoted to another 5. A yielded, B handed
    /// over to it: its reign 6 counts one more than the host's, and has nothing of it.
    #[test]
    fn a_history_that_parted_is_not_shown_though_a_planned_change_has_ended_it() {
        let had = known(4096, Some((5, "a")));
        let both = [(4, "x"), (5, "b"), (6, "c")];
        let later = [(4, "x"), (6, "b"), (7, "c")];
        for (reigns, planned) in [(both, 1), (both, 2), (both, 0), (later, 1), (later, 2)] {
            let verdict = judge(&had, &offered(&reigns, planned));
            let Verdict::Other(why) = verdict else { panic!("{reigns:?}: {verdict:?}") };
            assert!(why.contains("parted"), "{why}");
        }
    }

    #[test]
    fn an_older_or_parted_history_is_never_shown() {
        let had = known(4096, Some((2, "x")));
        for (reign, id) in [(1, "w"), (2, "y")] {
            let verdict = judge(&had, &offered(&[(reign, id)], 1));
            assert!(matches!(verdict, Verdict::Other(_)), "{reign} {id}: {verdict:?}");
        }
    }

    #[test]
    fn what_a_rewind_has_left_behind_is_never_mixed_with_what_came_back() {
        let had = known(4096, Some((2, "x")));
        let mut rewound = had.clone();
        rewound.identity.as_mut().unwrap().rewound = Some(4096);
        for (had, offered) in [(&had, &rewound), (&rewound, &had)] {
            let Verdict::Other(why) = judge(had, offered) else { panic!("{offered:?}") };
            assert!(why.contains("taken back"), "{why}");
        }
        assert_eq!(judge(&rewound, &rewound), Verdict::Same);
        let mut later = offered(&[(2, "x"), (3, "y")], 0);
        assert!(
            matches!(judge(&rewound, &later), Verdict::Other(_)),
            "a copy that had not gone back"
        );
        later.identity.as_mut().unwrap().rewound = Some(4096);
        assert!(matches!(judge(&rewound, &later), Verdict::LaterReign(_)));
        for offer in [&mut rewound, &mut later] {
            offer.identity.as_mut().unwrap().lsn = Some(4096);
        }
        let mut image = had.clone();
        image.identity.as_mut().unwrap().lsn = Some(4096);
        assert_eq!(judge(&image, &rewound), Verdict::Same, "an image stays what it is");
    }

    #[test]
    fn what_a_restore_has_replaced_is_never_mixed_with_what_it_brought() {
        let had = known(4096, Some((2, "x")));
        let restored = |reigns: &[(u64, &str)], at| {
            let mut offer = offered(reigns, 1);
            offer.identity.as_mut().unwrap().restored = Some(at);
            offer
        };
        let (first, second) = (restored(&[(2, "x")], 4096), restored(&[(2, "x")], 8192));
        let reigns = [(2, "x"), (3, "y")];
        let handed_over = offered(&reigns, 1);
        for (had, offered) in [(&had, &first), (&first, &second), (&first, &handed_over)] {
            let Verdict::Other(why) = judge(had, offered) else { panic!("{offered:?}") };
            assert!(why.contains("a restore has replaced"), "{why}");
        }
        assert_eq!(judge(&first, &first), Verdict::Same);
        assert_eq!(judge(&first, &restored(&reigns, 4096)), Verdict::Same, "handed over with it");
    }

    #[test]
    fn another_volume_is_never_shown() {
        let had = known(4096, Some((2, "x")));
        let mut offers = vec![known(4096, None), known(2048, Some((2, "x")))];
        let mut offer = had.clone();
        offer.flags |= export_flag::READ_ONLY;
        offers.push(offer);
        for change in [
            |identity: &mut Identity| identity.group_id = "b2".to_owned(),
            |identity: &mut Identity| identity.volume_number = 2,
            |identity: &mut Identity| identity.lsn = Some(4096),
        ] {
            let mut offer = had.clone();
            change(offer.identity.as_mut().unwrap());
            offers.push(offer);
        }
        for offer in offers {
            let verdict = judge(&had, &offer);
            assert!(matches!(verdict, Verdict::Other(_)), "{offer:?}: {verdict:?}");
        }
        let foreign = known(4096, None);
        assert!(matches!(judge(&foreign, &known(8192, None)), Verdict::Other(_)));
        assert!(matches!(judge(&foreign, &had), Verdict::Other(_)));
    }
}
