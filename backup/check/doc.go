// Package check finds damage in a repository, tells which files of which
// snapshots it affects, and repairs what can be repaired.
//
// Finding: [Run]. Repairing is in three steps, each with a plan that says what
// is lost before anything is changed: [PlanIndex], [PlanPacks] and
// [PlanSnapshots]. Looking again at what was written: [Written], [Rolling] and
// [Sample].
package check
