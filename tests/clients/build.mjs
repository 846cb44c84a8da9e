// In: {source, modules, out}: a program for a page, and where the modules are that it names.  Out: one script for a page.
import { build } from "esbuild";

const told = JSON.parse(process.argv[2]);
await build({
  stdin: { contents: told.source, loader: "jsx", resolveDir: told.modules },
  bundle: true,
  jsx: "automatic",
  define: { "process.env.NODE_ENV": '"production"' },
  nodePaths: [new URL("node_modules", import.meta.url).pathname],
  outfile: told.out,
  logLevel: "error",
});
