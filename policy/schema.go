package policy

import (
	"encoding/json"
	"fmt"
	"reflect"

	"github.com/invopop/jsonschema"
)

// Schema returns a JSON schema (draft 2020-12) of the configuration, so that
// an editor completes and checks it. It is made from the types that Load
// fills, and so knows the same keys.
func Schema() ([]byte, error) {
	r := jsonschema.Reflector{
		Anonymous:                  true,
		DoNotReference:             true,
		ExpandedStruct:             true,
		FieldNameTag:               "yaml",
		RequiredFromJSONSchemaTags: true,
		Mapper:                     schemaOf,
	}
	s := r.Reflect(&Config{})
	s.Title = "ide49-backup configuration"
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("schema of the configuration: %w", err)
	}
	return append(text, '\n'), nil
}

// expansion lets any text stand where the environment may supply the value.
const expansion = `\$\{[A-Za-z_][A-Za-z0-9_]*\}`

// schemaOf describes the types that read themselves from text; nil leaves
// the others to the reflector.
func schemaOf(t reflect.Type) *jsonschema.Schema {
	text := func(pattern string) *jsonschema.Schema {
		return &jsonschema.Schema{Type: "string", Pattern: pattern}
	}
	switch t {
	case reflect.TypeFor[DeviceName]():
		return text(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$|` + expansion)
	case reflect.TypeFor[Folder]():
		return text(`^/|` + expansion)
	case reflect.TypeFor[DiscoverFolder]():
		return text(`^$|^/|` + expansion)
	case reflect.TypeFor[Location]():
		return text(`^(file:)?/|` + expansion)
	case reflect.TypeFor[Size]():
		return &jsonschema.Schema{OneOf: []*jsonschema.Schema{
			{Type: "integer", Minimum: "0"},
			text(`^ *[0-9]+(\.[0-9]+)? *([KMGT](iB|B)?|kB|B)? *$|` + expansion),
		}}
	case reflect.TypeFor[bool]():
		return &jsonschema.Schema{OneOf: []*jsonschema.Schema{{Type: "boolean"}, text(expansion)}}
	case reflect.TypeFor[Command]():
		one := uint64(1)
		return &jsonschema.Schema{OneOf: []*jsonschema.Schema{
			{Type: "string", MinLength: &one},
			{Type: "array", Items: &jsonschema.Schema{Type: "string"}, MinItems: &one},
		}}
	case reflect.TypeFor[Zone](), reflect.TypeFor[Secret](), reflect.TypeFor[Pattern](),
		reflect.TypeFor[Glob](), reflect.TypeFor[FileName](), reflect.TypeFor[Name]():
		one := uint64(1)
		return &jsonschema.Schema{Type: "string", MinLength: &one}
	}
	return nil
}
