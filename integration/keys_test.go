package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/iot49/ide49-backup/backup/backend/local"
	"github.com/iot49/ide49-backup/backup/crypt"
	"github.com/iot49/ide49-backup/backup/repo"
)

// Keys that we make, list, remove and change are keys to stock restic, and the
// other way round.
func TestKeysWithRestic(t *testing.T) {
	ctx := t.Context()
	p := newPlace(t)
	cheap := crypt.Params{N: 2, R: 1, P: 1} // restic's own keys cost enough
	be, err := local.Create(p.dir, local.Options{})
	must(t, err)
	r, err := repo.Init(ctx, be, password, cheap, repo.Options{})
	must(t, err)
	opens := func(pw string) *repo.Repo {
		t.Helper()
		be, err := local.Open(p.dir, local.Options{})
		must(t, err)
		r, err := repo.Open(ctx, be, pw, repo.Options{})
		if err != nil {
			t.Fatalf("password %q: %v", pw, err)
		}
		return r
	}
	file := func(text string) string {
		name := filepath.Join(t.TempDir(), "password")
		must(t, os.WriteFile(name, []byte(text+"\n"), 0o600))
		return name
	}
	as := func(pw string) []string { return append(slices.Clone(p.env), "RESTIC_PASSWORD="+pw) }
	// restic's list, by ID, with the one it opened with.
	list := func(pw string) (ids []string, current string) {
		t.Helper()
		var keys []struct {
			Current  bool
			ID       string
			UserName string
			HostName string
			Created  string
		}
		must(t, json.Unmarshal([]byte(run(t, as(pw), "restic", "key", "list", "--json", "--no-lock")), &keys))
		ours, err := r.Keys(ctx)
		must(t, err)
		for _, k := range keys {
			if k.Current {
				current = k.ID
			}
			ids = append(ids, k.ID)
			o, err := repo.FindKey(ours, k.ID)
			must(t, err)
			if o.Username != k.UserName || o.Hostname != k.HostName || o.Created.Local().Format("2006-01-02 15:04:05") != k.Created {
				t.Errorf("we list %+v, restic %+v", o, k)
			}
		}
		if len(ids) != len(ours) {
			t.Errorf("we list %d keys, restic %d", len(ours), len(ids))
		}
		return ids, current
	}

	// We add, restic opens with it, lists it, and removes the one we began with.
	second, err := r.AddKey(ctx, "second", cheap, "ada", "laptop")
	must(t, err)
	ids, current := list("second")
	if len(ids) != 2 || !strings.HasPrefix(second.String(), current) {
		t.Errorf("restic lists %q and opens with %s", ids, current)
	}

	// restic adds, we open with it and remove it.
	run(t, as("second"), "restic", "key", "add", "--new-password-file", file("third"), "--user", "eve", "--host", "desk")
	third := opens("third")
	if ids, _ := list(password); len(ids) != 3 {
		t.Errorf("restic lists %q", ids)
	}
	must(t, r.RemoveKey(ctx, third.KeyID()))
	if out, err := command(as("third"), "restic", "snapshots", "--no-lock"); err == nil {
		t.Errorf("restic opens with a key that we removed: %s", out)
	}

	// restic changes the password of our second key; we change it once more.
	run(t, as("second"), "restic", "key", "passwd", "--new-password-file", file("fourth"))
	fourth := opens("fourth")
	_, err = fourth.ChangePassword(ctx, "fifth", cheap)
	must(t, err)
	if out, err := command(as("fourth"), "restic", "snapshots", "--no-lock"); err == nil {
		t.Errorf("restic opens with an old password: %s", out)
	}
	ids, current = list("fifth")
	if len(ids) != 2 {
		t.Errorf("restic lists %q", ids)
	}

	// restic removes one of ours, and refuses the one in use as we do.
	i := slices.IndexFunc(ids, func(id string) bool { return id != current })
	run(t, append(as("fifth"), "RESTIC_PROGRESS_FPS=0"), "restic", "key", "add", "--new-password-file", file(password))
	run(t, as("fifth"), "restic", "key", "remove", ids[i])
	if _, err := command(as("fifth"), "restic", "key", "remove", current); err == nil {
		t.Error("restic removes the key in use")
	}
	run(t, as("fifth"), "restic", "check")
	for _, r := range []*repo.Repo{r, third, fourth} {
		must(t, r.Close())
	}
}
