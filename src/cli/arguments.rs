//! Arguments that several commands take.

use std::fmt;
use std::str::FromStr;

use clap::Args;

use tidelog::units::Name;

/// A member of a group, written `GROUP/NAME`: a volume or a job.
#[derive(Clone, Debug)]
pub struct Member {
    /// The group.
    pub group: Name,
    /// The volume or job.
    pub name: Name,
}

impl FromStr for Member {
    type Err = String;
    fn from_str(text: &str) -> Result<Member, String> {
        let (group, name) =
            text.split_once('/').ok_or_else(|| format!("`{text}`: expected GROUP/NAME"))?;
        let group = group.parse().map_err(|error| format!("{error}"))?;
        let name = name.parse().map_err(|error| format!("{error}"))?;
        Ok(Member { group, name })
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.group, self.name)
    }
}

/// An opened image, written `GROUP@NAME`.
#[derive(Clone, Debug)]
pub struct ImageName {
    /// The group.
    pub group: Name,
    /// The image.
    pub name: Name,
}

impl FromStr for ImageName {
    type Err = String;
    fn from_str(text: &str) -> Result<ImageName, String> {
        let (group, name) =
            text.split_once('@').ok_or_else(|| format!("`{text}`: expected GROUP@NAME"))?;
        let group = group.parse().map_err(|error| format!("{error}"))?;
        let name = name.parse().map_err(|error| format!("{error}"))?;
        Ok(ImageName { group, name })
    }
}

/// A pair, written `KEY=VALUE`.
#[derive(Clone, Debug)]
pub struct Assignment {
    /// Before the `=`.
    pub key: String,
    /// Behind it.
    pub value: String,
}

impl FromStr for Assignment {
    type Err = String;
    fn from_str(text: &str) -> Result<Assignment, String> {
        let (key, value) =
            text.split_once('=').ok_or_else(|| format!("`{text}`: expected KEY=VALUE"))?;
        Ok(Assignment { key: key.to_owned(), value: value.to_owned() })
    }
}

/// A job, written `GROUP JOB` or `GROUP/JOB`.
#[derive(Args, Clone, Debug)]
pub struct JobName {
    /// The group, or GROUP/JOB
    #[arg(value_name = "GROUP")]
    group: String,
    /// The job
    #[arg(value_name = "JOB")]
    job: Option<Name>,
}

impl JobName {
    /// Group and job.
    ///
    /// # Errors
    ///
    /// Where they are no names, or the job is missing or given twice.
    pub fn resolve(&self) -> anyhow::Result<(Name, Name)> {
        match &self.job {
            Some(job) => Ok((self.group.parse()?, job.clone())),
            None => {
                let member: Member = self.group.parse().map_err(anyhow::Error::msg)?;
                Ok((member.group, member.name))
            }
        }
    }
}
