package policy

import (
	"encoding"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// Bounds on what a file may ask of the decoder. Aliases let a few lines
// stand for billions of values, so values are counted as they are visited.
const (
	maxNodes    = 20_000
	maxDepth    = 32
	maxProblems = 100
)

// A decoder fills Go values from the syntax tree of one file. goccy's own
// decoder stops at the first mistake; this one notes each and goes on, so
// that a person sees all of them. What it sets, and what keys there are, it
// learns from the yaml tags of the types.
type decoder struct {
	src      *source
	env      Env
	problems []Problem
	// dropped counts the problems beyond maxProblems; droppedError says
	// that an error was among them.
	dropped      int
	droppedError bool
	anchors      map[string]ast.Node
	nodes        int
	depth        int
	// at holds where each setting is: its key, or its value in a list.
	at map[string]ast.Node
}

// errTooMuch ends decoding at a bound; the problem is noted already.
var errTooMuch = errors.New("too much")

// decode reads the file into target, a pointer to a struct that may hold
// defaults. Problems are in d.problems.
func (d *decoder) decode(target any) {
	d.at = map[string]ast.Node{}
	d.anchors = map[string]ast.Node{}
	if p, found := d.src.unreadable(); found {
		d.problems = append(d.problems, p)
		return
	}
	body, ok := d.parse()
	if !ok || body == nil {
		return
	}
	if !d.collectAnchors(body) {
		return
	}
	defer func() {
		if r := recover(); r != nil && r != any(errTooMuch) {
			panic(r)
		}
	}()
	d.value(body, reflect.ValueOf(target).Elem(), "")
}

// parse returns the only document of the file, nil where it is empty.
func (d *decoder) parse() (body ast.Node, ok bool) {
	// The parser was not written for hostile files; what it trips over is
	// no YAML that a person wrote.
	defer func() {
		if r := recover(); r != nil {
			d.problems = append(d.problems, d.src.problem(SeverityError, "", 0, 0, 0, "not valid YAML"))
			body, ok = nil, false
		}
	}()
	tokens := lexer.Tokenize(d.src.text)
	if tk := tooDeep(tokens); tk != nil {
		d.token(SeverityError, tk, "", "lists and mappings are nested more than %d deep", maxDepth)
		return nil, false
	}
	file, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		var syntax *yaml.SyntaxError
		if !errors.As(err, &syntax) || syntax.Token == nil {
			d.problems = append(d.problems, d.src.problem(SeverityError, "", 0, 0, 0, "not valid YAML"))
			return nil, false
		}
		message := "not valid YAML: " + syntax.Message
		if line := syntax.Token.Position.Line; line >= 1 && line <= len(d.src.lines) {
			text := d.src.lines[line-1]
			// A quoted part of the text may be a part of a password.
			if strings.Contains(syntax.Message, `"`) && text != d.src.shown[line-1] {
				message = "not valid YAML"
			}
			if indent := text[:len(text)-len(strings.TrimLeft(text, " \t"))]; strings.Contains(indent, "\t") {
				d.token(SeverityError, syntax.Token, "", "not valid YAML: a tab at the start of the line; use spaces")
				return nil, false
			}
		}
		d.token(SeverityError, syntax.Token, "", "%s; look at colons, quotes and indentation around here", message)
		return nil, false
	}
	for _, doc := range file.Docs {
		if doc.Body == nil {
			continue
		}
		if body != nil {
			d.node(SeverityError, doc.Body, "", "a second document begins here; the configuration is one")
			return nil, false
		}
		body = doc.Body
	}
	if _, null := body.(*ast.NullNode); null {
		return nil, true
	}
	return body, true
}

// tooDeep returns the first token that is nested deeper than any
// configuration: the parser is recursive and would exhaust its stack.
func tooDeep(tokens token.Tokens) *token.Token {
	flow, row, line := 0, 0, 0
	for _, tk := range tokens {
		switch tk.Type {
		case token.MappingStartType, token.SequenceStartType:
			flow++
		case token.MappingEndType, token.SequenceEndType:
			flow--
		}
		// "- - - x" and "? ? x" nest within one line, other blocks by
		// indentation.
		if tk.Position.Line != line {
			row, line = 0, tk.Position.Line
		}
		switch tk.Type {
		case token.SequenceEntryType, token.MappingKeyType, token.AnchorType, token.TagType:
			row++
		}
		if flow > maxDepth || row > maxDepth || tk.Position.IndentNum > 8*maxDepth {
			return tk
		}
	}
	return nil
}

func (d *decoder) collectAnchors(body ast.Node) bool {
	ok := true
	ast.Walk(visitor(func(n ast.Node) {
		a, is := n.(*ast.AnchorNode)
		if !is || a.Name == nil {
			return
		}
		name := a.Name.GetToken().Value
		if _, twice := d.anchors[name]; twice {
			d.node(SeverityError, a.Name, "", "the anchor %q is defined twice", name)
			ok = false
			return
		}
		d.anchors[name] = a.Value
	}), body)
	return ok
}

type visitor func(ast.Node)

func (v visitor) Visit(n ast.Node) ast.Visitor { v(n); return v }

// add notes a problem.
func (d *decoder) add(p Problem) {
	if len(d.problems) >= maxProblems {
		d.dropped++
		d.droppedError = d.droppedError || p.Severity == SeverityError
		return
	}
	d.problems = append(d.problems, p)
}

// node notes a problem at a node.
func (d *decoder) node(s Severity, n ast.Node, key, format string, args ...any) {
	tk := n.GetToken()
	// The token of a mapping is its first colon; a person looks for its
	// first key.
	if m, ok := n.(*ast.MappingNode); ok && !m.IsFlowStyle && len(m.Values) > 0 {
		tk = m.Values[0].Key.GetToken()
	}
	d.token(s, tk, key, format, args...)
}

// faulty reports whether an error is known at a setting or below it.
func (d *decoder) faulty(key string) bool {
	return slices.ContainsFunc(d.problems, func(p Problem) bool {
		rest, ok := strings.CutPrefix(p.Key, key)
		return p.Severity == SeverityError && ok && (rest == "" || rest[0] == '.' || rest[0] == '[')
	})
}

// token notes a problem at a token.
func (d *decoder) token(s Severity, tk *token.Token, key, format string, args ...any) {
	line, column, width := 0, 0, 1
	if tk != nil && tk.Position != nil {
		line, column, width = d.src.locate(tk)
	}
	d.add(d.src.problem(s, key, line, column, width, d.src.hide(oneLine(fmt.Sprintf(format, args...)))))
}

// setting notes a problem at a setting by its path.
func (d *decoder) setting(s Severity, key, format string, args ...any) {
	n, ok := d.at[key]
	if !ok {
		d.add(d.src.problem(s, key, 0, 0, 0, oneLine(fmt.Sprintf(format, args...))))
		return
	}
	d.node(s, n, key, format, args...)
}

// maxMessage is how many characters of a message are shown: values that are
// quoted in it may be of any length.
const maxMessage = 400

// oneLine keeps hostile text in a message from breaking the line.
func oneLine(s string) string {
	if len(s) > maxMessage {
		if runes := []rune(s); len(runes) > maxMessage {
			s = string(runes[:maxMessage]) + "…"
		}
	}
	return strings.Map(func(r rune) rune {
		if notPrintable(r) {
			return '�'
		}
		return r
	}, s)
}

// locate returns where a token is. The lexer's columns are off for some
// tokens that span lines or follow others like them, so the line itself has
// the last word.
func (s *source) locate(tk *token.Token) (line, column, width int) {
	line, column = tk.Position.Line, tk.Position.Column
	if line < 1 || line > len(s.lines) {
		return 0, 0, 0
	}
	text := s.lines[line-1]
	first, _, _ := strings.Cut(strings.TrimLeft(tk.Origin, " \t\n"), "\n")
	first = strings.TrimRight(first, " \t")
	if first == "" {
		first = tk.Value
	}
	width = max(1, utf8.RuneCountInString(first))
	// The occurrence of the text that is nearest to the column.
	best := -1
	for i := 0; first != "" && i < len(text); {
		j := strings.Index(text[i:], first)
		if j < 0 {
			break
		}
		c := utf8.RuneCountInString(text[:i+j]) + 1
		if best < 0 || abs(c-column) < abs(best-column) {
			best = c
		}
		i += j + 1
	}
	if best > 0 {
		return line, best, width
	}
	return line, column, 1
}

func abs(n int) int { return max(n, -n) }

// resolve follows anchors and aliases to the value itself.
func (d *decoder) resolve(n ast.Node, key string) (ast.Node, bool) {
	for range maxDepth {
		switch v := n.(type) {
		case *ast.AnchorNode:
			n = v.Value
		case *ast.AliasNode:
			name := v.Value.GetToken().Value
			target, ok := d.anchors[name]
			if !ok {
				d.node(SeverityError, v.Value, key, "there is no anchor %q", name)
				return nil, false
			}
			n = target
		case *ast.TagNode:
			d.node(SeverityError, v, key, "tags such as %s are not supported", v.Start.Value)
			return nil, false
		case nil:
			return nil, false
		default:
			return n, true
		}
	}
	d.node(SeverityError, n, key, "aliases that lead in a circle")
	return nil, false
}

// value sets v from a node.
func (d *decoder) value(n ast.Node, v reflect.Value, key string) {
	if d.nodes++; d.nodes > maxNodes {
		d.node(SeverityError, n, key, "more than %d values; do aliases multiply here?", maxNodes)
		panic(errTooMuch)
	}
	if d.depth++; d.depth > maxDepth {
		d.node(SeverityError, n, key, "nested more than %d deep; do aliases lead in a circle?", maxDepth)
		panic(errTooMuch)
	}
	defer func() { d.depth-- }()

	n, ok := d.resolve(n, key)
	if !ok {
		return
	}
	if v.Kind() == reflect.Pointer {
		v.Set(reflect.New(v.Type().Elem()))
		v = v.Elem()
	}
	if c, ok := v.Addr().Interface().(*Command); ok {
		d.command(n, c, key)
		return
	}
	if t, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		d.text(n, t, v.Kind() == reflect.Int64, key)
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		d.structure(n, v, key)
	case reflect.Map:
		d.mapping(n, v, key)
	case reflect.Slice:
		d.list(n, v, key)
	case reflect.Bool:
		d.bool(n, v, key)
	case reflect.String:
		if s, ok := d.scalar(n, false, key, "text"); ok {
			v.SetString(s)
		}
	default:
		panic("policy: no way to read a " + v.Type().String())
	}
}

// A pair is a key and its value, with the name that the key stands for.
type pair struct {
	name  string
	key   ast.Node
	value ast.Node
}

// pairs returns what a mapping holds, with merged mappings ("<<") behind
// what the mapping says itself; ok is false where n is no mapping.
func (d *decoder) pairs(n ast.Node, key string) (all []pair, ok bool) {
	m, is := n.(ast.MapNode)
	if !is {
		return nil, false
	}
	seen := map[string]pair{}
	var merged []ast.Node
	for it := m.MapRange(); it.Next(); {
		k := it.Key()
		if k.IsMergeKey() {
			merged = append(merged, it.Value())
			continue
		}
		tk := k.GetToken()
		name := tk.Value
		switch k := k.(type) {
		case *ast.StringNode:
			name = k.Value
		case *ast.MappingKeyNode, *ast.AliasNode, *ast.AnchorNode, *ast.TagNode, *ast.LiteralNode:
			d.token(SeverityError, tk, key, "a key must be plain text")
			continue
		}
		if severalLines(tk) {
			d.token(SeverityError, tk, key, "a key over several lines; is a quote missing?")
			continue
		}
		p := pair{name, k, it.Value()}
		if first, twice := seen[name]; twice {
			d.token(SeverityError, tk, join(key, name), "%q is given twice; first in line %d", name, first.key.GetToken().Position.Line)
			continue
		}
		seen[name] = p
		all = append(all, p)
	}
	for _, n := range merged {
		for _, p := range d.merge(n, key) {
			if _, own := seen[p.name]; !own {
				seen[p.name] = p
				all = append(all, p)
			}
		}
	}
	return all, true
}

// merge returns the pairs that "<<: n" brings in: of a mapping, or of a list
// of mappings, of which earlier ones win.
func (d *decoder) merge(n ast.Node, key string) []pair {
	if d.nodes++; d.nodes > maxNodes {
		d.node(SeverityError, n, key, "more than %d values; do aliases multiply here?", maxNodes)
		panic(errTooMuch)
	}
	if d.depth++; d.depth > maxDepth {
		d.node(SeverityError, n, key, "nested more than %d deep; do aliases lead in a circle?", maxDepth)
		panic(errTooMuch)
	}
	defer func() { d.depth-- }()
	r, ok := d.resolve(n, key)
	if !ok {
		return nil
	}
	if list, is := r.(*ast.SequenceNode); is {
		var all []pair
		for _, item := range list.Values {
			all = append(all, d.merge(item, key)...)
		}
		return all
	}
	all, ok := d.pairs(r, key)
	if !ok {
		d.node(SeverityError, n, key, `"<<" wants an alias of a mapping`)
	}
	return all
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// structure sets the fields of v by their yaml tags.
func (d *decoder) structure(n ast.Node, v reflect.Value, key string) {
	if _, null := n.(*ast.NullNode); null {
		return // a key with all that is below it commented out
	}
	pairs, ok := d.pairs(n, key)
	if !ok {
		d.mismatch(n, key, "a group of settings (name: value)")
		return
	}
	fields := fieldNames(v.Type())
	for _, p := range pairs {
		i := slices.Index(fields, p.name)
		if i < 0 {
			d.unknown(p, v.Interface(), fields, key)
			continue
		}
		k := join(key, p.name)
		d.at[k] = p.key
		d.value(p.value, v.Field(i), k)
	}
}

// fieldNames returns the key of each field of t, "" for those that are not
// in the file.
func fieldNames(t reflect.Type) []string {
	names := make([]string, t.NumField())
	for i := range names {
		name, _, _ := strings.Cut(t.Field(i).Tag.Get("yaml"), ",")
		if name != "-" {
			names[i] = name
		}
	}
	return names
}

// unknown notes a key that nothing is known about, with the best advice.
func (d *decoder) unknown(p pair, in any, fields []string, key string) {
	where := "at the top level"
	if key != "" {
		where = "in " + key
	}
	k := join(key, p.name)
	fields = slices.DeleteFunc(slices.Clone(fields), func(s string) bool { return s == "" })
	if later, ok := in.(interface{ notYet() []string }); ok && slices.Contains(later.notYet(), p.name) {
		d.node(SeverityError, p.key, k, "%q is not supported by this version yet; remove it", p.name)
		return
	}
	if elsewhere := placesOf(p.name); len(elsewhere) > 0 {
		d.node(SeverityError, p.key, k, "%q does not belong %s, but in %s", p.name, where, strings.Join(elsewhere, " or "))
		return
	}
	name := quoteShort(p.name)
	if s := nearest(p.name, fields); s != "" {
		d.node(SeverityError, p.key, k, "unknown key %s %s; did you mean %q?", name, where, s)
		return
	}
	slices.Sort(fields)
	d.node(SeverityError, p.key, k, "unknown key %s %s; known are %s", name, where, strings.Join(fields, ", "))
}

// placesOf returns the sections in which a key of the configuration belongs.
func placesOf(name string) []string {
	var found []string
	var visit func(t reflect.Type, path string)
	visit = func(t reflect.Type, path string) {
		for i, field := range fieldNames(t) {
			switch ft := t.Field(i).Type; {
			case field == "":
			case field == name && path != "":
				found = append(found, path)
			case ft.Kind() == reflect.Map:
				visit(ft.Elem(), join(path, field)+".NAME")
			case ft.Kind() == reflect.Struct && !reflect.PointerTo(ft).Implements(reflect.TypeFor[encoding.TextUnmarshaler]()):
				visit(ft, join(path, field))
			}
		}
	}
	visit(reflect.TypeFor[Config](), "")
	return found
}

// mapping sets a map whose keys are names that the user chose.
func (d *decoder) mapping(n ast.Node, v reflect.Value, key string) {
	if _, null := n.(*ast.NullNode); null {
		return
	}
	pairs, ok := d.pairs(n, key)
	if !ok {
		d.mismatch(n, key, "a group of named entries (name: …)")
		return
	}
	m := reflect.MakeMap(v.Type())
	for _, p := range pairs {
		name := reflect.New(v.Type().Key())
		if err := name.Interface().(encoding.TextUnmarshaler).UnmarshalText([]byte(p.name)); err != nil {
			d.node(SeverityError, p.key, key, "%s: %v", key, err)
			continue
		}
		k := join(key, p.name)
		d.at[k] = p.key
		item := reflect.New(v.Type().Elem()).Elem()
		d.value(p.value, item, k)
		m.SetMapIndex(name.Elem(), item)
	}
	v.Set(m)
}

func (d *decoder) list(n ast.Node, v reflect.Value, key string) {
	if _, null := n.(*ast.NullNode); null {
		return
	}
	seq, ok := n.(*ast.SequenceNode)
	if !ok {
		d.mismatch(n, key, "a list, as [a, b]")
		return
	}
	s := reflect.MakeSlice(v.Type(), 0, len(seq.Values))
	for i, item := range seq.Values {
		k := fmt.Sprintf("%s[%d]", key, i)
		d.at[k] = item
		e := reflect.New(v.Type().Elem()).Elem()
		d.value(item, e, k)
		s = reflect.Append(s, e)
	}
	v.Set(s)
}

func (d *decoder) bool(n ast.Node, v reflect.Value, key string) {
	if b, ok := n.(*ast.BoolNode); ok {
		v.SetBool(b.Value)
		return
	}
	// Only what comes from the environment is text that may mean a truth
	// value.
	if s, ok := n.(*ast.StringNode); ok && strings.Contains(s.Value, "${") {
		text, ok := d.scalar(n, false, key, "true or false")
		if !ok {
			return
		}
		switch text {
		case "true", "false":
			v.SetBool(text == "true")
		default:
			d.node(SeverityError, n, key, "%s must be true or false, not %s", key, quoteShort(text))
		}
		return
	}
	d.mismatch(n, key, "true or false")
}

// text sets a value that reads itself from text.
func (d *decoder) text(n ast.Node, t encoding.TextUnmarshaler, number bool, key string) {
	want := "text"
	if number {
		want = "a size, as 500MiB"
	}
	s, ok := d.scalar(n, number, key, want)
	if !ok {
		return
	}
	err := t.UnmarshalText([]byte(s))
	if err == nil {
		return
	}
	if severalLines(n.GetToken()) || strings.Contains(strings.TrimSpace(s), "\n") {
		// With a quote missing the text may be half the file, passwords
		// among it, so it is not shown.
		d.node(SeverityError, n, key, "%s goes on over several lines; is a quote missing?", key)
		return
	}
	if tk := n.GetToken(); strings.Contains(tk.Value, "${") && !isSecretKey(key) {
		d.node(SeverityError, n, key, "%s, from the environment: %v", key, err)
		return
	}
	d.node(SeverityError, n, key, "%s: %v", key, err)
}

// severalLines reports whether a scalar begins on one line and ends on
// another.
func severalLines(tk *token.Token) bool {
	return strings.Contains(strings.Trim(tk.Origin, " \t\n"), "\n")
}

// command reads a Command: a list, or one text for the shell.
func (d *decoder) command(n ast.Node, c *Command, key string) {
	if _, ok := n.(*ast.SequenceNode); !ok {
		s, ok := d.scalar(n, false, key, "a list of program and arguments, or text")
		if ok && strings.TrimSpace(s) == "" {
			d.node(SeverityError, n, key, "%s: an empty command", key)
		} else if ok {
			*c = Command{"/bin/sh", "-c", s}
		}
		return
	}
	var words []string
	d.list(n, reflect.ValueOf(&words).Elem(), key)
	if len(words) == 0 || words[0] == "" {
		d.node(SeverityError, n, key, "%s: an empty command", key)
		return
	}
	*c = words
}

// scalar returns the text of a single value after expansion. A number is
// accepted only where one is wanted: elsewhere quotes tell that 0123 or 1e3
// is not to be read as one.
func (d *decoder) scalar(n ast.Node, number bool, key, want string) (string, bool) {
	var s string
	switch n := n.(type) {
	case *ast.StringNode:
		s = n.Value
	case *ast.LiteralNode:
		s = n.Value.Value
	case *ast.IntegerNode, *ast.FloatNode:
		if number {
			return n.GetToken().Value, true
		}
		d.mismatch(n, key, want)
		return "", false
	default:
		d.mismatch(n, key, want)
		return "", false
	}
	s, err := expand(s, d.env)
	if err != nil {
		d.node(SeverityError, n, key, "%s: %v", key, err)
		return "", false
	}
	return s, true
}

// mismatch notes a value of the wrong type.
func (d *decoder) mismatch(n ast.Node, key, want string) {
	got, hint := "", ""
	switch n := n.(type) {
	case *ast.NullNode:
		if key == "" {
			key = "the configuration"
		}
		d.node(SeverityError, d.orKey(n, key), key, "%s has no value; give it one or remove it", key)
		return
	case *ast.BoolNode:
		got = "true or false"
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		got = "a number"
	case *ast.StringNode:
		got = "text"
		if want == "true or false" && n.Token.Type == token.StringType {
			got = quoteShort(n.Value)
		} else if want == "true or false" {
			hint = "; leave out the quotes"
		}
	case *ast.LiteralNode:
		got = "text"
	case *ast.SequenceNode:
		got = "a list"
	default:
		got = "a mapping (name: value)"
	}
	if want == "text" {
		switch n.(type) {
		case *ast.BoolNode, *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
			hint = "; put it in quotes"
		}
	}
	if key == "" {
		key = "the configuration"
	}
	d.node(SeverityError, n, key, "%s must be %s, not %s%s", key, want, got, hint)
}

// orKey returns the node of a setting's key, for a value that has no text of
// its own to point at.
func (d *decoder) orKey(n ast.Node, key string) ast.Node {
	if k, ok := d.at[key]; ok {
		return k
	}
	return n
}

// expand replaces ${NAME} by the variable's value, and $${ by ${. Values are
// not expanded again.
func expand(s string, env Env) (string, error) {
	var b strings.Builder
	for {
		i := strings.Index(s, "${")
		if i < 0 {
			b.WriteString(s)
			return b.String(), nil
		}
		if i > 0 && s[i-1] == '$' {
			b.WriteString(s[:i-1])
			b.WriteString("${")
			s = s[i+2:]
			continue
		}
		b.WriteString(s[:i])
		name, rest, ok := strings.Cut(s[i+2:], "}")
		if !ok {
			return "", errors.New("${ has no }; write $${ for the characters themselves")
		}
		if !isVariable(name) {
			// It is not shown, since it may be a part of a password.
			return "", errors.New("what stands between ${ and } is no name of an environment variable; write $${ for the characters themselves")
		}
		value, set := env(name)
		if !set {
			return "", fmt.Errorf("the environment variable %s is not set", name)
		}
		b.WriteString(value)
		s = rest
	}
}

func isVariable(name string) bool {
	for i, c := range []byte(name) {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '_'
		if !letter && (i == 0 || c < '0' || c > '9') {
			return false
		}
	}
	return name != ""
}
