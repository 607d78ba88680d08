module.exports = {
  uiPort: 1880,
  flowFile: "flows.json",
  logging: { console: { level: "info" } },
};
