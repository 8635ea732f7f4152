//! What an export is beyond its name, as its description tells it: `attach` compares this before it
//! gives a running file system another connection.
//!
//! The description of a volume or image ends in `; ` and words `KEY=VALUE`:
//!
//! | key | value |
//! | --- | --- |
//! | `group-id` | 32 hexadecimal digits |
//! | `volume-number` | the volume's number, never used twice in a group |
//! | `reign` | counts the reigns of the group; a later one may lack what this one answered |
//! | `reign-id` | 16 hexadecimal digits, random |
//! | `reason` | why the reign began, for people |
//! | `planned` | how many reigns, this one and back, began with all that was answered before |
//! | `before` | the reigns before this, `COUNTER:ID` each, newest first, 16 at most |
//! | `rewound` | where the group went back last, if ever: what was read before is gone |
//! | `restored` | where a restore into the volume began last, if ever: the same |
//! | `lsn` | of an image: its moment |

use std::fmt;

/// What an export is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The group.
    pub group_id: String,
    /// The volume.
    pub volume_number: u32,
    /// Counts the reigns of the group.
    pub reign: u64,
    /// The reign's random id.
    pub reign_id: String,
    /// Why the reign began.
    pub reason: String,
    /// How many reigns, this one and back, began with all that was answered before.
    pub planned: usize,
    /// The reigns before this, newest first: counter and id of [`Identity::BEFORE_MAX`] at most.
    pub before: Vec<(u64, String)>,
    /// Where the group went back last; `None` where it never did.
    pub rewound: Option<u64>,
    /// Where a restore into the volume began last; `None` where none ever did.
    pub restored: Option<u64>,
    /// An image's moment; `None` for a live volume.
    pub lsn: Option<u64>,
}

impl Identity {
    /// How many of the reigns before are told: who was away for more of them is not judged by them.
    pub const BEFORE_MAX: usize = 16;

    /// What a description tells; `None` where it is not one of Tidelog's.
    #[must_use]
    pub fn parse(description: &str) -> Option<Identity> {
        let (_, words) = description.rsplit_once("; ")?;
        let value = |key: &str| {
            words.split(' ').filter_map(|word| word.split_once('=')).find(|(k, _)| *k == key)
        };
        let text = |key: &str| value(key).map(|(_, value)| value.to_owned());
        Some(Identity {
            group_id: text("group-id")?,
            volume_number: text("volume-number")?.parse().ok()?,
            reign: text("reign")?.parse().ok()?,
            reign_id: text("reign-id")?,
            reason: text("reason")?,
            planned: text("planned").map_or(Ok(0), |count| count.parse()).ok()?,
            before: text("before").map_or(Some(Vec::new()), |all| reigns(&all))?,
            rewound: text("rewound").map(|lsn| lsn.parse()).transpose().ok()?,
            restored: text("restored").map(|lsn| lsn.parse()).transpose().ok()?,
            lsn: text("lsn").map(|lsn| lsn.parse()).transpose().ok()?,
        })
    }

    /// Whether both are the same volume, at the same moment where they are images; the reign may
    /// differ.
    #[must_use]
    pub fn is_same_volume(&self, other: &Identity) -> bool {
        (&self.group_id, self.volume_number, self.lsn)
            == (&other.group_id, other.volume_number, other.lsn)
    }
}

/// Reigns in order, `COUNTER:ID` each, with commas between.
fn reigns(text: &str) -> Option<Vec<(u64, String)>> {
    let reign = |text: &str| {
        let (counter, id) = text.split_once(':')?;
        Some((counter.parse().ok()?, id.to_owned()))
    };
    text.split(',').map(reign).collect()
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Identity { group_id, volume_number, reign, reign_id, reason, planned, .. } = self;
        write!(
            f,
            "group-id={group_id} volume-number={volume_number} reign={reign} reign-id={reign_id} \
             reason={reason} planned={planned}"
        )?;
        for (index, (counter, id)) in self.before.iter().enumerate() {
            let between = if index == 0 { " before=" } else { "," };
            write!(f, "{between}{counter}:{id}")?;
        }
        let places = [("rewound", self.rewound), ("restored", self.restored), ("lsn", self.lsn)];
        for (key, value) in places {
            if let Some(value) = value {
                write!(f, " {key}={value}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_reads_back_from_a_description_and_nothing_else_is_one() {
        let mut identity = Identity {
            group_id: "000102030405060708090a0b0c0d0e0f".to_owned(),
            volume_number: 3,
            reign: 7,
            reign_id: "0011223344556677".to_owned(),
            reason: "promote".to_owned(),
            planned: 0,
            before: Vec::new(),
            rewound: None,
            restored: None,
            lsn: None,
        };
        let text = format!("volume v of group g; {identity}");
        assert_eq!(
            text,
            "volume v of group g; group-id=000102030405060708090a0b0c0d0e0f volume-number=3 \
             reign=7 reign-id=0011223344556677 reason=promote planned=0"
        );
        assert_eq!(Identity::parse(&text), Some(identity.clone()));
        assert_eq!(
            Identity::parse(text.strip_suffix(" planned=0").unwrap()),
            Some(identity.clone()),
            "who tells nothing of the reigns before"
        );
        identity.planned = 1;
        identity.before = vec![(6, "66".repeat(8)), (4, "44".repeat(8))];
        let told = format!("x; {identity}");
        assert!(told.ends_with("planned=1 before=6:6666666666666666,4:4444444444444444"), "{told}");
        assert_eq!(Identity::parse(&told), Some(identity.clone()));
        assert_eq!(Identity::parse(&told.replace("6:66", "666")), None);
        (identity.rewound, identity.restored, identity.lsn) = (Some(512), Some(1024), Some(4096));
        let image = format!("volume v of group g at LSN 4096; {identity}");
        assert_eq!(Identity::parse(&image), Some(identity.clone()));
        assert!(!identity.is_same_volume(&Identity::parse(&text).unwrap()));
        for other in ["", "memory", "volume v of group g", "x; reign=1", "x; lsn=y reign=z"] {
            assert_eq!(Identity::parse(other), None, "{other}");
        }
    }
}
