// In: names of packages.  Out: the version of each, as it is installed, and whether it can be loaded.
import { readFileSync } from "node:fs";

for (const name of JSON.parse(process.argv[2])) {
  const at = new URL(`node_modules/${name}/package.json`, import.meta.url);
  const { version } = JSON.parse(readFileSync(at, "utf8"));
  const module = await import(name);
  console.log(JSON.stringify({ name, version, exports: Object.keys(module).length > 0 }));
}
